"""Writes one entry per segment into the arenas."""

from kvpolicy_kernels.append.op import append, append_next

__all__ = ["append", "append_next"]
