from kvpolicy_kernels.key_centre.centre import CIRCLE, KeyCentre

__all__ = ["CIRCLE", "KeyCentre"]
