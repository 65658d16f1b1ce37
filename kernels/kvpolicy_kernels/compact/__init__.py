"""Moves chosen rows of an arena or of a chunk of new tokens into an arena."""

from kvpolicy_kernels.compact.op import compact

__all__ = ["compact"]
