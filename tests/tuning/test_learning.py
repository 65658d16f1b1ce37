"""An allocator that learns does so once for each level, and what it learned is measured like a trial."""

from dataclasses import dataclass, replace

import pytest
import torch

from kvpolicy import PluginError, StudyError, TransformersProbe
from tests.tuning.searches import CONTEXT, Fixed, StopAt, losses_by_spread, make_settings, run, the_study


@dataclass(frozen=True, slots=True)
class Counted(Fixed):
    """Counts how often it learns."""

    times: int = 1

    def fit(self, probe, importance, budget):
        FITS.append((self.times, budget.total))
        shares = torch.ones(budget.shape)
        shares[0] *= 3
        return shares


FITS: list[tuple[int, int]] = []


@dataclass(frozen=True, slots=True)
class Halting(Fixed):
    """Is interrupted the first time, under each parameter."""

    times: int = 1

    def fit(self, probe, importance, budget):
        STATES.append((self.times, probe.saved()))
        if probe.saved() is None:
            probe.save({"step": 3, "of": self.times})
            raise KeyboardInterrupt
        return torch.ones(budget.shape)


STATES: list[tuple[int, object]] = []


def test_learning_goes_on_from_the_state_that_was_kept_under_the_same_settings(tmp_path, monkeypatch, offered):
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_spread)
    settings = make_settings(tmp_path, allocator=offered(Halting), allocator_params={"times": 1}, retentions=(0.4,))
    STATES.clear()
    for times in (1, 2):  # no trial has run yet, so other settings take the study over, but not what was kept in it
        with pytest.raises(KeyboardInterrupt):
            run(replace(settings, allocator_params={"times": times}, resume=times > 1))
    run(replace(settings, allocator_params={"times": 2}, resume=True))
    assert STATES == [(1, None), (2, None), (2, {"step": 3, "of": 2})]


def test_a_level_is_learned_once_and_kept_in_the_study(tmp_path, monkeypatch, offered):
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_spread)
    settings = make_settings(
        tmp_path, allocator=offered(Counted), allocator_params={"times": 7}, retentions=(0.4, 0.2), trials=5
    )
    FITS.clear()
    with monkeypatch.context() as patch:
        StopAt(patch, 2)  # in the trial of the second level, which has been learned but not measured
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    first, second = round(0.4 * CONTEXT * 4), round(0.2 * CONTEXT * 4)
    assert [(7, first), (7, second)] == FITS
    plan = run(replace(settings, resume=True))
    assert [(7, first), (7, second), (7, second)] == FITS, "what was measured is not learned again"
    assert plan.provenance["trials"] == 1 and len(the_study(settings).trials) == 1
    resumed = run(replace(settings, resume=True))
    assert len(FITS) == 3 and all(map(torch.equal, [x.shares for x in resumed.levels], [x.shares for x in plan.levels]))
    with pytest.raises(StudyError, match=r"allocator_params was \{\"times\": 7\}, now \{\"times\": 8\}"):
        run(replace(settings, resume=True, allocator_params={"times": 8}))


@pytest.mark.parametrize("better", [False, True])
def test_what_was_learned_is_stored_only_where_it_beats_uniform(tmp_path, monkeypatch, offered, better):
    def losses(self, capacities):
        for given in losses_by_spread(self, capacities):
            yield 6 - given if better else given

    monkeypatch.setattr(TransformersProbe, "token_losses", losses)
    settings = make_settings(tmp_path, allocator=offered(Counted), allocator_params={"times": 7})
    level = run(settings).levels[0]
    assert level.allocator_params == ({"times": 7} if better else {})
    assert level.comparison["verdict"] == ("better than uniform" if better else "uniform kept: no trial beat it")
    assert bool((level.shares == 0.4).all()) != better


def test_parameters_of_an_allocator_are_for_one_that_learns(tmp_path):
    settings = make_settings(tmp_path, allocator_params={"floor_share": 0.1})
    with pytest.raises(PluginError, match="'baklava' are searched, not given; got floor_share"):
        run(settings)
    settings = make_settings(tmp_path, allocator="learned", allocator_params={"step": 3})
    with pytest.raises(PluginError, match="step"):
        run(settings)
