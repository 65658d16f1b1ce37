"""Small searches on a tiny model, plugins made for them, and ways to stop one."""

import json
from dataclasses import dataclass

import optuna
import pytest
import torch
from optuna.trial import TrialState

from kvpolicy import Budget, BudgetAllocator, Importance, ImportanceEstimator
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning import TuneSettings, search, tune
from kvpolicy.tuning.storage import open_storage
from tests.tiny import tiny_model

CONTEXT = 64


def make_corpus(seed=0, name="drawn"):
    """Token ids in which each one depends on one some 20 positions before, so that long windows pay."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (2000,), generator=generator)
    for i in range(20, 2000):
        if i % 3:
            ids[i] = ids[i - 20]
    return Corpus(name, str(seed) * 64, ids[:1200], ids[1200:])


def make_settings(tmp_path, **changes):
    given = {"retentions": (0.4,), "context_length": CONTEXT, "trials": 3, "choose_dtype": False}
    places = {"out": tmp_path / "plan.json", "storage": tmp_path / "plan.json.study"}
    return TuneSettings(**{**given, **places, **changes})


def run(settings, model=None, corpus=None):
    return tune(model or tiny_model("Llama", layers=2), corpus or make_corpus(), settings)


def the_study(settings, retention=0.4):
    """The newest one of a level, also without trials."""
    kept = open_storage(settings.storage)
    begins = settings.study_name(retention) + "-"
    names = [study.study_name for study in kept.get_all_studies() if study.study_name.startswith(begins)]
    return optuna.load_study(study_name=names[-1], storage=kept)


def states(study):
    return [trial.state.name for trial in study.trials]


def points(study):
    return [trial.params for trial in study.trials if trial.state == TrialState.COMPLETE]


@dataclass(frozen=True, slots=True)
class OneHead(BudgetAllocator):
    """Nearly everything to one KV head, the more the larger `skew`; 0 is uniform."""

    skew: float = 50.0

    def shares(self, importance: Importance, budget: Budget) -> torch.Tensor:
        shares = torch.ones(budget.shape)
        shares[0, 0] += self.skew
        return shares

    @classmethod
    def suggest(cls, trial):
        return cls(skew=trial.suggest_float("skew", 40.0, 60.0))


@dataclass(frozen=True, slots=True)
class WiderSpace(OneHead):
    @classmethod
    def suggest(cls, trial):
        return cls(skew=trial.suggest_float("skew", 30.0, 60.0))


@dataclass(frozen=True, slots=True)
class Fixed(BudgetAllocator):
    """Nothing to search; the second layer gets three times the first one's."""

    def shares(self, importance: Importance, budget: Budget) -> torch.Tensor:
        shares = torch.ones(budget.shape)
        shares[-1] *= 3
        return shares


@dataclass(frozen=True, slots=True)
class Learned(Fixed):
    def fit(self, probe, importance, budget):
        shares = torch.ones(budget.shape)
        shares[0] *= 2 + budget.total
        return shares


@dataclass(frozen=True, slots=True)
class BrokenAllocator(BudgetAllocator):
    def shares(self, importance: Importance, budget: Budget) -> torch.Tensor:
        raise ZeroDivisionError("no head matters")


@dataclass(frozen=True, slots=True)
class BrokenEstimator(ImportanceEstimator):
    def estimate(self, probe):
        raise RuntimeError("no power")


class StopAt:
    """Raises KeyboardInterrupt from inside the evaluation of the n-th trial, in its first sequence."""

    def __init__(self, monkeypatch, number):
        self.number, self.calls = number, 0
        self.plain = search.chunk_parts
        monkeypatch.setattr(search, "chunk_parts", self)

    def __call__(self, losses):
        self.calls += 1
        for index, parts in enumerate(self.plain(losses)):
            if self.calls == self.number and index == 0:
                raise KeyboardInterrupt
            yield parts


def interrupt(monkeypatch, settings, number, **more):
    """A search that is interrupted in its n-th trial."""
    with monkeypatch.context() as patch:
        StopAt(patch, number)
        with pytest.raises(KeyboardInterrupt):
            run(settings, **more)


def without_times(path):
    document = json.loads(path.read_text())
    del document["provenance"]["created"]
    for cost in document["provenance"]["calibration"]:
        del cost["seconds"]
    return json.dumps(document)


def losses_by_spread(self, capacities):
    """The more uneven a table, the worse; each sequence and token has a noise of its own that is always the same."""
    spread = float((capacities.double() / capacities.double().mean() - 1).abs().mean())
    for index in range(len(self.sequences)):
        noise = torch.rand(1, CONTEXT - CONTEXT // 4, generator=torch.Generator().manual_seed(index))
        yield (3 + spread + 0.01 * noise).float()


class Notes(Progress):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said.append(message)
