"""Losses that a search reports, kept in its study: a search that is resumed measures none of them twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import optuna
import torch
from torch import Tensor

from kvpolicy.tuning.probes import Losses, Probes
from kvpolicy.tuning.storage import settings_digest


def known_losses(study: optuna.Study, part: str, probes: Probes, table: Callable[[int], Tensor]) -> Losses:
    """`probes.losses(table)`, or what the study has of it. part: whose probes they are, search or heldout"""
    tables = [table(each.context_length).tolist() for each in probes.all]
    digest = hashlib.sha256(json.dumps(tables).encode()).hexdigest()[:16]
    name = f"kvpolicy_losses:{settings_digest(study)}:{part}:{digest}"
    if name in study.user_attrs:
        text, answers = (x and torch.tensor(x, dtype=torch.float64) for x in study.user_attrs[name])
        return probes.scored(text, answers)
    found = probes.losses(table)
    study.set_user_attr(name, [found.text.tolist(), None if found.answers is None else found.answers.tolist()])
    return found
