"""Bridges to model libraries. transformers is imported nowhere else."""
