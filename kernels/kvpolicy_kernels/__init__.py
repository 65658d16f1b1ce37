"""KV-cache kernels of kvpolicy: one folder an op, with op, reference and kernel; `segments.py` is what they share."""
