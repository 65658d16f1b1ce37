"""How many programs share the entries of a layer that are encoded."""

from __future__ import annotations

import torch

PROGRAMS_PER_SM = 8  # of one warp each: of 4, 6, 8, 11 and 16 the fastest for int4 on an H200


def encoded_programs(device: torch.device) -> int:
    """`num_programs` of a plan for `encoded_attention`."""
    if device.type != "cuda":
        return PROGRAMS_PER_SM
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
