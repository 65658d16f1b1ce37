"""Attention of a whole sequence under the window rule: sink tokens and the most recent, one capacity a KV head."""

from kvpolicy_kernels.window_attention.op import window_attention

__all__ = ["window_attention"]
