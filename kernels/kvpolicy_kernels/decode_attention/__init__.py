"""Attention of a few queries over segments of different lengths: the decoding step, at the limit of the memory."""

from kvpolicy_kernels.decode_attention.op import Attended, decode_attention
from kvpolicy_kernels.decode_attention.plan import WorkPlan, plan_work

__all__ = ["Attended", "WorkPlan", "decode_attention", "plan_work"]
