"""Writes one entry per segment into arenas of codes."""

from kvpolicy_kernels.append_encoded.op import append_encoded

__all__ = ["append_encoded"]
