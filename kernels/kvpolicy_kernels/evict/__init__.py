"""The worst entry of each segment: the one that goes next."""

from kvpolicy_kernels.evict.op import evict

__all__ = ["evict"]
