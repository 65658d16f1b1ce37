"""KeyDiff: keep the entries whose keys are unlike the others.

Source: KeyDiff, arXiv:2504.15364, the algorithm with the mean of normalised keys as anchor; read too: NVIDIA/kvpress,
kvpress/presses/keydiff_press.py. Different on purpose: absent entries are left out of the anchor, so that a padded row
keeps what it keeps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity, normalize

from kvpolicy import DecodeStep, EvictionPolicy, LayerActivations

EPSILON = 1e-12
"""Of a key that is zero, or absent."""


@dataclass(frozen=True, slots=True)
class KeyDiffPolicy(EvictionPolicy):
    """The score of an entry is minus the cosine of its key and the anchor, the mean of the KV head's normalised keys.

    Keys that point elsewhere than most tend to draw much attention, and no query is needed to find them. The anchor is
    that of the entries held now and the new ones: it moves with each chunk and each decoding step.

    num_sink_tokens: first positions that are never evicted
    recent_window:   last positions that are never evicted; the paper's variant with a sliding window
    """

    requires: ClassVar[frozenset[str]] = frozenset({"keys", "positions"})

    num_sink_tokens: int = 0
    recent_window: int = 0

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        absent = (activations.positions < 0)[..., None]
        keys = activations.keys.masked_fill(absent, 0.0)  # before any product: they may hold NaN
        lengths: Tensor = vector_norm(keys, dim=-1, keepdim=True, dtype=torch.float32).clamp(min=EPSILON)
        directions = keys / lengths  # float32, the one copy that is made: keys are read where they lie, in their type
        anchor = normalize(directions.sum(2), dim=-1)  # a cosine does not see that the sum is no mean
        return -directions.matmul(anchor[..., None]).squeeze(-1)

    def score_step(self, step: DecodeStep) -> Tensor:
        keys = step.keys.float()
        anchors = step.total(normalize(keys, dim=-1))
        return -cosine_similarity(keys, step.at_segment(anchors), dim=-1)
