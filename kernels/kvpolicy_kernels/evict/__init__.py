"""The worst entry of each segment, the one that goes next, and the order of all candidates of a selection."""

from kvpolicy_kernels.evict.op import evict, evict_into, rank

__all__ = ["evict", "evict_into", "rank"]
