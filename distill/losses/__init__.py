"""Losses as arguments: divergence weightings, metrics on predictions, adversarial heads."""
