"""Tasks of lm-evaluation-harness over compressed caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvpolicy.budget.entry_format import Format, name_of
from kvpolicy.defaults import MIN_TOKENS
from kvpolicy.errors import BudgetError, KVPolicyError
from kvpolicy.progress import Progress
from kvpolicy.verbs import arguments
from kvpolicy.verbs.cache_choice import CacheChoice, load_network


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """What the harness found.

    run:     what was asked, and on what it ran
    results: of each task, the figures under the harness's names, and `n`
    """

    run: dict[str, Any]
    results: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """What `kvpolicy lm-eval --json` prints."""
        return {**self.run, "results": self.results}


def lm_eval(
    tasks: str | Sequence[str],
    plan: str | Path = "full",
    *,
    retention: float | None = None,
    policy: str | None = None,
    policy_param: Mapping[str, Any] | None = None,
    allocator: str | None = None,
    min_tokens: int = MIN_TOKENS,
    format: str | Format = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> HarnessRun:
    """Runs tasks of lm-evaluation-harness: a context is compressed once, what follows it is scored or generated.

    tasks:        the harness's names, one or several
    plan:         a plan file, "uniform" or "full"
    retention:    kept fraction of a context, in (0, 1]; None for the plan's highest level. "uniform" needs one
    policy, policy_param: who evicts, and parameters over its own; None for the plan's, or streaming
    allocator:    what splits the budget where there is no plan; None for uniform
    min_tokens:   mean entries per KV head that are kept whatever the retention: shorter contexts stay whole
    format:       of the entries: "int8", "int4", "think", "model" for the model's dtype; None for the plan's own
    include_path: a folder of YAML files with tasks of your own
    num_fewshot:  examples in front of each question; None for the task's own number
    limit:        samples of each task; None for all
    seed:         of the harness
    model:        a Hub id, a directory, a .gguf file; None for the plan's, which is not downloaded
    batch_size:   contexts of one generation

    Raises `BudgetError`, `KVPolicyError` (also where the harness is not installed), `ModelError`, `PlanError`,
    `PluginError`.
    """
    names = [str(name) for name in arguments.several(tasks)]
    if not names:
        raise KVPolicyError("name the tasks to run: tasks=NAME, one or several")
    folder = arguments.optional_path(include_path)
    if folder is not None and not folder.is_dir():
        raise KVPolicyError(f"include_path={folder} is no directory")
    arguments.check_least(1, limit=limit, batch_size=batch_size)
    arguments.check_least(0, num_fewshot=num_fewshot)
    choice = CacheChoice.of(str(plan), policy, policy_param, allocator, min_tokens, format)
    kept = _retention(choice, retention)
    where = arguments.pick_device(device)
    number = arguments.pick_dtype(dtype, where)
    if find_spec("lm_eval") is None:
        raise KVPolicyError("lm-evaluation-harness is not installed: pip install 'kvpolicy[lm-eval]'")

    progress = progress or Progress()
    name, network, tokenizer = load_network(model, choice.plan, progress, revision=revision, device=where, dtype=number)
    progress.note(f"{name} from {network.kvpolicy_source}, on {where}")
    from kvpolicy.integrations.lm_eval.harness_run import run_tasks
    from kvpolicy.integrations.lm_eval.policy_lm import PolicyLM

    caches: dict[str, Any] = {
        "retention": kept,
        "policy": choice.policy,
        "allocator": choice.allocator,
        "min_tokens": min_tokens,
        "format": format,
    }
    subject = PolicyLM(network, tokenizer, choice.plan, batch_size=batch_size, **caches)
    sizes: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "seed": seed}
    results = run_tasks(subject, names, include=folder, **sizes)
    run = {"model": name, "plan": choice.name, "policy": choice.policy_name, "retention": kept}
    run |= {"format": name_of(choice.entry_format(kept))}
    run |= {"min_tokens": min_tokens, **sizes, "device": where, "dtype": str(network.dtype).removeprefix("torch.")}
    versions = {package: version(package) for package in ("kvpolicy", "lm_eval", "torch", "transformers")}
    return HarnessRun(run | {"versions": versions}, results)


def _retention(choice: CacheChoice, retention: float | None) -> float:
    choice.check(retention)
    if choice.name == "full":
        return 1.0
    if retention is not None:
        return retention
    if choice.plan is None:
        raise BudgetError("lm-eval uniform needs retention=; or give a plan file, or full")
    return choice.plan.retentions[-1]
