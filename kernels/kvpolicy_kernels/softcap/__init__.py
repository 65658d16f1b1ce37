"""Scores that are capped softly."""
