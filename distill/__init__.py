"""distill: turn a diffusers pipeline of 20–1000 network calls per sample into one of 1–8."""

__version__ = "0.1.0"
