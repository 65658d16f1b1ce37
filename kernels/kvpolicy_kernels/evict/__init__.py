"""The worst entry of each segment: the one that goes next."""

from kvpolicy_kernels.evict.op import evict, evict_into

__all__ = ["evict", "evict_into"]
