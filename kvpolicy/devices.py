"""What a device is called where figures are shown."""

from __future__ import annotations

import torch


def device_name(device: torch.device | str) -> str:
    """The GPU's own name, and `cpu`."""
    where = torch.device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
