"""Attention over segments whose entries are codes of 8 or 4 bits."""

from kvpolicy_kernels.encoded_attention.op import encoded_attention
from kvpolicy_kernels.encoded_attention.programs import encoded_programs

__all__ = ["encoded_attention", "encoded_programs"]
