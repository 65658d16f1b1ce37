"""Rows as codes of 8 or 4 bits."""

from kvpolicy_kernels.encode.op import encode

__all__ = ["encode"]
