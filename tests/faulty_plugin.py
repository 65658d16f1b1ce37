"""A plugin of the distribution `acme`, each of whose methods can be told to fail, and a registry that finds it."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

import kvpolicy
from kvpolicy import BudgetAllocator, EvictionPolicy, Importance, ImportanceEstimator, registry

WRITTEN = {
    "acme-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1.2\n",
    "acme-1.2.dist-info/entry_points.txt": "[kvpolicy]\nmain = acme_plugin\n",
    "acme_plugin.py": """
import kvpolicy

@kvpolicy.hookimpl
def kvpolicy_register(register):
    register.estimator("faulty", "tests.faulty_plugin:Estimator")
    register.allocator("faulty", "tests.faulty_plugin:Allocator")
    register.policy("faulty", "tests.faulty_plugin:Policy")
    register.policy("unmakeable", "tests.faulty_plugin:Unmakeable")
    register.policy("leaving", "tests.faulty_plugin:Leaving")
""",
}


class Odd(BaseException):
    """What no `except Exception` catches."""

    def __str__(self):
        raise SystemExit(0)


FAULTS = {
    "exit": lambda: SystemExit(0),
    "value": lambda: ValueError("two\nlines"),
    "generator": lambda: GeneratorExit(),
    "stop": lambda: StopIteration(),
    "odd": lambda: Odd(),
    "refusal": lambda: kvpolicy.PluginError("not today"),
    "interrupt": lambda: KeyboardInterrupt(),
}


def offer(folder, monkeypatch):
    """Installs the plugin for one test."""
    for name, text in WRITTEN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "acme_plugin", raising=False)
    for name, empty in {"_plugins": None, "_all": {}, "_named": {}, "_classes": {}}.items():
        monkeypatch.setattr(registry, name, empty)


def spoiled(plugin, method, right):
    """What a method returns: what it should, unless the plugin is told to fail there."""
    if plugin.where != method:
        return right
    if plugin.how in FAULTS:
        raise FAULTS[plugin.how]()
    return {
        "none": lambda: None,
        "list": lambda: right.tolist(),
        "meta": lambda: right.to("meta"),
        "complex": lambda: right.to(torch.complex64),
        "sparse": lambda: right.to_sparse(),
        "shape": lambda: right[..., :-1],
        "double": lambda: right.double(),
        "nan": lambda: right.float() * torch.nan,
        "inf": lambda: right.float() + torch.inf,
        "negative": lambda: right.float() - 1e6,
        "zero": lambda: right * 0,
    }[plugin.how]()


@dataclass(frozen=True, slots=True)
class Estimator(ImportanceEstimator):
    requires: ClassVar[frozenset[str]] = frozenset({"keys"})
    token_measure: ClassVar[str] = "nothing"
    where: str = ""
    how: str = "exit"

    def __post_init__(self):
        spoiled(self, "__post_init__", None)

    def num_forwards(self, spec, *, prompts, sequences):
        return spoiled(self, "num_forwards", prompts)

    def estimate(self, probe):
        probe.observe(lambda activations: None, self.requires)
        right = torch.ones(probe.spec.table_shape)
        if self.how == "one head":
            return Importance(torch.ones(1, 1))
        if self.how in ("nan", "inf", "negative", "meta", "complex", "shape"):
            return Importance(spoiled(self, "estimate", right))
        return spoiled(self, "estimate", Importance(right))

    def token_maps(self, probe):
        shape = probe.spec.num_budgeted_layers, probe.spec.num_q_heads
        return [spoiled(self, "token_maps", torch.ones(*shape, len(prompt))) for prompt in probe.prompts]


@dataclass(frozen=True, slots=True)
class Allocator(BudgetAllocator):
    split_scope: ClassVar[str] = "none"
    needs_importance: ClassVar[bool] = False
    where: str = ""
    how: str = "exit"

    def __post_init__(self):
        spoiled(self, "__post_init__", None)

    def shares(self, importance, budget):
        return spoiled(self, "shares", torch.ones(budget.shape))

    def split(self, scores, budget):
        return spoiled(self, "split", torch.ones(len(scores[0]), *budget.shape))


@dataclass(frozen=True, slots=True)
class Learning(Allocator):
    def fit(self, probe, importance, budget):
        return spoiled(self, "fit", torch.ones(budget.shape))


@dataclass(frozen=True, slots=True)
class Policy(EvictionPolicy):
    requires: ClassVar[frozenset[str]] = frozenset({"keys"})
    num_sink_tokens: int = 1
    where: str = ""
    how: str = "exit"

    def __post_init__(self):
        spoiled(self, "__post_init__", None)

    def params(self):
        found = {"num_sink_tokens": self.num_sink_tokens, "where": self.where, "how": self.how}
        return spoiled(self, "params", found)

    def score_prompt(self, activations):
        return spoiled(self, "score_prompt", activations.keys.float().norm(dim=-1))

    def score_step(self, step):
        return spoiled(self, "score_step", step.scores.clamp(max=9))


@dataclass(frozen=True, slots=True)
class Unmakeable(Policy):
    def __post_init__(self):
        raise SystemExit(0)


@dataclass(frozen=True, slots=True)
class Leaving(Policy):
    """Prints, and leaves at the first decoded token."""

    def score_prompt(self, activations):
        print("scoring")
        return activations.keys.float().norm(dim=-1)

    def score_step(self, step):
        raise SystemExit(0)
