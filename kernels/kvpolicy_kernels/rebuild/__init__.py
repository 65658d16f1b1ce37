"""An arena put together again from some of its entries and of a chunk's tokens."""

from kvpolicy_kernels.rebuild.op import rebuild

__all__ = ["rebuild"]
