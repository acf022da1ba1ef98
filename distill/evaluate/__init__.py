"""Measures of a pipeline: distances, accuracy, throughput; and the report."""
