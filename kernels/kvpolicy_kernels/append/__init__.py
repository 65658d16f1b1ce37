"""Writes one entry per segment into the arenas."""

from kvpolicy_kernels.append.op import append

__all__ = ["append"]
