"""What a device says is heard later, and nobody waits for it."""

import copy

import pytest
import torch

from kvpolicy.cache import scoring
from kvpolicy.cache.late_copy import LateCopy
from kvpolicy.cache.scoring import NotANumber
from kvpolicy.errors import PluginError
from tests.cache.policies import HeavyHitter

FINE, WRONG = torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan])


class SlowCopy(LateCopy):
    """Arrives when a test says so."""

    arrived = True

    @property
    def has_arrived(self):
        return SlowCopy.arrived


@pytest.fixture
def on_a_device(monkeypatch):
    """As if the flag lay on a device; what would wait for it fails. Returns a look, which says whether it raised."""
    monkeypatch.setattr(scoring, "waits", lambda tensor: True)
    monkeypatch.setattr(scoring, "LateCopy", SlowCopy)
    monkeypatch.setattr(SlowCopy, "arrived", True)

    def look(wrong):
        with monkeypatch.context() as patch:
            patch.setattr(NotANumber, "check", lambda *_: pytest.fail("the device was waited for"))
            wrong.look(HeavyHitter(), "score_step")

    return look


def told(wrong, scores):
    """What a decoded token's scores in layer 1 say."""
    wrong.flag(1, scores.device).logical_or_(scores.isnan().any())


def test_what_went_wrong_is_heard_at_the_next_look(on_a_device):
    wrong = NotANumber(3)
    on_a_device(wrong)  # nothing has come
    for _ in range(3):
        told(wrong, FINE)
        on_a_device(wrong)
    told(wrong, WRONG)
    told(wrong, FINE)
    on_a_device(wrong)
    with pytest.raises(PluginError, match=r"HeavyHitter.score_step returned NaN in layer 1: absent"):
        wrong.look(HeavyHitter(), "score_step")
    for _ in range(2):  # said once
        on_a_device(wrong)


def test_a_device_that_is_behind_is_asked_again(on_a_device):
    wrong = NotANumber(3)
    told(wrong, WRONG)
    SlowCopy.arrived = False
    for _ in range(3):
        on_a_device(wrong)
    SlowCopy.arrived = True
    with pytest.raises(PluginError, match="NaN"):
        wrong.look(HeavyHitter(), "score_step")


def test_a_copy_hears_of_it_too_and_by_itself(on_a_device):
    wrong = NotANumber(3)
    told(wrong, WRONG)
    on_a_device(wrong)
    for other in (wrong.fork(), copy.deepcopy(wrong), wrong):
        with pytest.raises(PluginError, match="NaN"):
            other.check(HeavyHitter(), "score_step")
        on_a_device(other)


def test_where_nothing_waits_a_look_is_a_check():
    wrong = NotANumber(3)
    told(wrong, WRONG)
    with pytest.raises(PluginError, match="NaN"):
        wrong.look(HeavyHitter(), "score_step")
    wrong.look(HeavyHitter(), "score_step")


def test_layers_of_a_prompt_are_asked_once_and_copies_by_themselves():
    wrong = NotANumber(3)
    for layer, scores in enumerate((FINE, WRONG, torch.tensor([-torch.inf, torch.inf]))):
        wrong.add(layer, scores)
    for other in (wrong.fork(), copy.deepcopy(wrong), wrong):
        assert len(other.tensors) == 3
        with pytest.raises(PluginError, match=r"HeavyHitter.score_prompt returned NaN in layer 1: absent"):
            other.check(HeavyHitter(), "score_prompt")
        other.check(HeavyHitter(), "score_prompt")
        assert other.tensors == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_it_arrives_without_waiting():
    flag = torch.ones((), dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        late = LateCopy(flag)
        assert isinstance(late.has_arrived, bool)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert late.has_arrived and bool(late.value) and late.value.is_pinned()
