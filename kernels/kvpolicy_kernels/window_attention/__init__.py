"""Attention of a whole sequence under the window rule: sink tokens and the most recent, one capacity a KV head."""

from kvpolicy_kernels.window_attention.coded import coded_window_attention
from kvpolicy_kernels.window_attention.op import window_attention

__all__ = ["coded_window_attention", "window_attention"]
