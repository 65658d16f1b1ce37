"""How fast this machine runs the model, and in which dtype the search should run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.integrations.transformers.model.logits import keep_logits

SPEEDUP = 1.25
"""bf16 must be this much faster on the CPU to be worth it."""
AGREEMENT = 2e-3
"""and its loss this close to fp32's, relatively."""
_LARGEST = 4_000_000_000  # bytes of fp32 weights up to which a second copy is made to try


@dataclass(frozen=True, slots=True)
class Pace:
    """seconds: one forward of one sequence; dtype: what the model runs in now; reason: why, in words."""

    seconds: float
    dtype: torch.dtype
    reason: str


def set_pace(model: PreTrainedModel, sequence: Tensor, *, choose_dtype: bool) -> Pace:
    """Times a forward over `sequence` int64 `[T]`; with `choose_dtype`, an fp32 model on a CPU moves to bf16 in place
    where that is at least 1.25 times faster and the loss agrees within 0.2 %.
    """
    seconds, loss = _timed(model, sequence)
    if not choose_dtype or model.device.type != "cpu" or model.dtype != torch.float32:
        return Pace(seconds, model.dtype, "as loaded")
    if sum(parameter.nbytes for parameter in model.parameters()) > _LARGEST:
        return Pace(seconds, model.dtype, "too large to try bf16 beside it")
    weights = [parameter.data for parameter in model.parameters()]
    cast_parameters(model, torch.bfloat16)
    fast, rounded = _timed(model, sequence)
    figures = (
        f"bf16 runs {seconds / fast:.1f} times as fast as fp32 here, its loss differs by {abs(rounded / loss - 1):.2%}"
    )
    if seconds / fast >= SPEEDUP and abs(rounded / loss - 1) <= AGREEMENT:
        return Pace(fast, torch.bfloat16, figures)
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data = weight
    return Pace(seconds, torch.float32, figures)


def weights_sha256(model: PreTrainedModel) -> str:
    """Identity of the weights: names, shapes and first values of all parameters, as bf16 so that dtypes agree."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:64].bfloat16().float().cpu().tolist()
        digest.update(json.dumps([name, list(parameter.shape), sample]).encode())
    return digest.hexdigest()


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters only: `model.to` would round the rotary frequencies too, which transformers keeps in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def own_parameters(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards the model has the parameters that it came with, whatever dtype it ran in meanwhile."""
    weights = [parameter.data for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight


def _timed(model: PreTrainedModel, sequence: Tensor) -> tuple[float, float]:
    """(seconds of the faster of two forwards, mean loss past the first quarter)."""
    ids = sequence[None].to(model.device)
    first = ids.shape[1] // 4
    elapsed = []
    with torch.no_grad():
        for _ in range(2):
            begin = time.perf_counter()
            logits = model(ids, use_cache=False, **keep_logits(model, ids.shape[1] - first)).logits[
                0, -(ids.shape[1] - first) :
            ]
            loss = float(F.cross_entropy(logits[:-1].float(), ids[0, first + 1 :]))  # float() waits for the device
            elapsed.append(time.perf_counter() - begin)
    return min(elapsed), loss
