"""Attention over segments of different lengths that lie in one arena."""

from kvpolicy_kernels.ragged_attention.op import ragged_attention

__all__ = ["ragged_attention"]
