"""Attention over segments of different lengths that lie in one arena: of any queries, and of a decoding step."""

from kvpolicy_kernels.attention.op import Attended, decode_attention, ragged_attention
from kvpolicy_kernels.attention.plan import WorkPlan, plan_work

__all__ = ["Attended", "WorkPlan", "decode_attention", "plan_work", "ragged_attention"]
