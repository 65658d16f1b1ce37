"""Scores of entries that are codes."""
