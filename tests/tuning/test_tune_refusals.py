"""What a search refuses, and whose fault it says it is."""

import pytest
import torch

from kvpolicy import BudgetError, ModelError, PluginError, TextError
from kvpolicy.text.corpus import Corpus
from tests.tiny import tiny_model
from tests.tuning.searches import BrokenAllocator, BrokenEstimator, make_settings, run


@pytest.mark.parametrize("retention", [0.0, 1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_a_retention_outside_0_and_1_is_refused(tmp_path, retention):
    with pytest.raises(BudgetError, match=r"must lie in \(0, 1\), got"):
        make_settings(tmp_path, retentions=(0.5, retention))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retentions": ()}, "each retention once, got none"),
        ({"retentions": (0.5, 0.3, 0.5)}, "each retention once, got 0.5, 0.3, 0.5"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"context_length": 63}, "context_length must be at least 64, got 63"),
        ({"prefill_length": 64}, "prefill_length must be below the context of 64, got 64"),
        ({"prefill_length": -1}, "prefill_length must be below the context of 64, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_out_of_range_are_refused(tmp_path, change, message):
    with pytest.raises(BudgetError, match=message):
        make_settings(tmp_path, **change)


def test_a_text_that_is_too_short_is_refused_with_what_is_needed(tmp_path):
    short = Corpus("short", "0" * 64, torch.arange(300) % 97, torch.arange(300) % 97)
    with pytest.raises(TextError, match=r"short is too short: .* 300 tokens .* needs 384 and 256"):
        run(make_settings(tmp_path), corpus=short)
    assert not list(tmp_path.iterdir()), "refused before a study is made"


@pytest.mark.parametrize(
    ("role", "double", "message"),
    [
        ("allocator", BrokenAllocator, "ZeroDivisionError: no head matters"),
        ("estimator", BrokenEstimator, "RuntimeError: no power"),
    ],
)
def test_an_exception_of_a_plugin_names_it(tmp_path, offered, role, double, message):
    with pytest.raises(PluginError, match=rf"^{role} .*{double.__name__}\.\w+ raised {message}"):
        run(make_settings(tmp_path, **{role: offered(double, "mine")}))


def test_a_loss_that_is_not_finite_is_an_error_not_an_endless_search(tmp_path):
    model = tiny_model("Llama", layers=2)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ModelError, match=r"not finite in torch\.float32"):
        run(make_settings(tmp_path), model)
