"""The pieces of a segment, joined by their log-sum-exps."""
