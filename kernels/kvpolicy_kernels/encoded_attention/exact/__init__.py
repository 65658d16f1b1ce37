"""Attention to what is not encoded, beside codes."""
