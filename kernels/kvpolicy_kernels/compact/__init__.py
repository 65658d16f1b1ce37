"""Moves chosen rows: of an arena or of a chunk of new tokens into an arena, or within an arena's segments."""

from kvpolicy_kernels.compact.op import compact, compact_in_place

__all__ = ["compact", "compact_in_place"]
