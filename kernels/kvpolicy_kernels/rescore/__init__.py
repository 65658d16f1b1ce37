"""New scores in the place of the old."""

from kvpolicy_kernels.rescore.op import rescore

__all__ = ["rescore"]
