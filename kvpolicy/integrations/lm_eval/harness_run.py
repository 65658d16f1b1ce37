"""Running the harness's tasks. Import this module only where lm_eval is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from kvpolicy.errors import KVPolicyError, foreign
from kvpolicy.integrations.lm_eval.policy_lm import PolicyLM


def run_tasks(
    model: PolicyLM,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The figures of each task, as the harness names them.

    include: a folder of YAML files with tasks of one's own

    Raises `KVPolicyError` for a task that the harness does not know or cannot run.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise KVPolicyError(
            f"lm-eval has no task {', '.join(unknown)}: name others, or their folder with include_path="
        )
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with foreign("lm-eval cannot run these tasks", KVPolicyError):
        document = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            **seeds,
        )
    assert document is not None  # it is for other ranks alone
    results: dict[str, dict[str, Any]] = document["results"]
    counts = document.get("n-samples", {})
    return {name: figures | {"n": counts.get(name, {}).get("effective")} for name, figures in results.items()}
