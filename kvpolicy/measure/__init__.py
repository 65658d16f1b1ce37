"""Measuring models, heads and machines, and the statistics of it."""
