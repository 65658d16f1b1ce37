"""The attention mass that each cache entry gets from a block of queries."""

from kvpolicy_kernels.column_scores.op import Reduction, column_scores

__all__ = ["Reduction", "column_scores"]
