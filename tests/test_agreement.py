"""How alike rankings are, what shrinking a layer costs, and the verb that asks."""

import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
from kvpolicy_baklava.estimator import CosineEstimator
from kvpolicy_baselines.uniform import UniformEstimator
from scipy.stats import spearmanr

from kvpolicy import Importance, ImportanceEstimator, PluginError
from kvpolicy.measure.ablation import ablate_layers, layer_importance, num_forwards
from kvpolicy.measure.agreement import agreement, pairs, variants
from kvpolicy.measure.ranks import chance_correlation, rank_correlation
from kvpolicy.progress import Progress
from kvpolicy.testing import LawError, SyntheticProbe, check_estimator

TEXTS = {"one": SyntheticProbe(lengths=(24, 33)), "other": SyntheticProbe(lengths=(24, 33), seed=1)}
PROMPTS = {str(length): SyntheticProbe(lengths=(length,)) for length in (12, 24, 40)}


@dataclass(frozen=True, slots=True)
class LongOnly(ImportanceEstimator):
    """Refuses short prompts."""

    def estimate(self, probe):
        if max(map(len, probe.prompts)) < 20:
            raise PluginError("too short")
        return CosineEstimator().estimate(probe)


@pytest.mark.parametrize("levels", [1000, 4])
def test_rank_correlation_is_scipys_with_ties_and_without(levels):
    a, b = torch.randint(levels, (2, 40)).float()
    assert rank_correlation(a, b + 0.5 * a) == pytest.approx(spearmanr(a, b + 0.5 * a).statistic, abs=1e-12)
    assert math.isnan(rank_correlation(a, torch.ones(40)))


@pytest.mark.parametrize("n", [30, 90])
def test_unrelated_rankings_stay_within_the_bound_19_times_of_20(n):
    drawn = [abs(rank_correlation(*torch.rand(2, n))) for _ in range(2000)]
    assert sum(x < chance_correlation(n) for x in drawn) / len(drawn) == pytest.approx(0.95, abs=0.02)


def test_variants_are_the_values_a_parameter_names():
    found = variants("cosine", {"group": "max"})
    assert list(found) == [
        "cosine group=max",
        "cosine group=max head_input=slice",
        "cosine group=max head_input=proj",
        "cosine group=max head_input=proj_residual",
    ]
    assert list(found.values())[2] == CosineEstimator(head_input="proj", group="max")
    assert len(variants("cosine", {})) == 5 and list(variants("entropy", {})) == ["entropy"]


def test_agreement_is_scipys_of_each_pair_of_rankings():
    estimators = {"a": CosineEstimator(), "b": CosineEstimator(head_input="proj")}
    found = agreement(estimators, TEXTS, PROMPTS, Progress())
    assert (found.estimators, found.texts, found.prompts) == (["a", "b"], ["one", "other"], ["12", "24", "40"])
    assert found.failures == {} and found.num_heads == 6

    def expected(first, second):
        return spearmanr(*(e.estimate(probe).per_head.flatten() for e, probe in (first, second))).statistic

    first = TEXTS["one"]
    for (i, a), (j, b) in itertools.product(enumerate(estimators.values()), repeat=2):
        assert float(found.estimator[i, j]) == pytest.approx(expected((a, first), (b, first)), abs=1e-9)
    for e, one in enumerate(estimators.values()):
        for matrix, probes in ((found.text[e], TEXTS), (found.prompt[e], PROMPTS)):
            for (i, p), (j, q) in itertools.product(enumerate(probes.values()), repeat=2):
                assert float(matrix[i, j]) == pytest.approx(expected((one, p), (one, q)), abs=1e-9)
    assert json.loads(json.dumps(found.document(), allow_nan=False))["kv_heads"] == 6


def test_what_cannot_be_ranked_is_left_out_with_its_reason():
    found = agreement({"long": LongOnly(), "same": UniformEstimator()}, TEXTS, PROMPTS, Progress())
    assert found.failures["long, 12"].endswith("LongOnly.estimate refuses: too short")
    assert "equally important" in found.failures["same, one"] and len(found.failures) == 1 + 5
    assert bool(found.prompt[0, 0].isnan().all()) and not bool(found.prompt[0, 1:, 1:].isnan().any())
    assert len(pairs(found.prompt[0])) == 1 and pairs(found.prompt[1]) == []
    assert found.document()["across_estimators"] == [[1.0, None], [None, None]]


def test_each_layer_is_shrunk_alone_to_an_eighth():
    probe = SyntheticProbe(num_layers=4)
    found = ablate_layers(probe, Progress())
    assert probe.forwards == num_forwards(probe.spec, probe.num_sequences) == 5 * 2
    assert (found.capacity, found.context) == (8, 64)
    full = probe.loss(torch.full((4, 2), 64))
    for layer in range(4):
        table = torch.full((4, 2), 64)
        table[layer] = 8
        assert float(found.increase[layer]) == pytest.approx(float((probe.loss(table) - full).mean()))


def test_the_correlation_of_layers_is_scipys_and_none_where_nothing_is_ranked():
    found = ablate_layers(SyntheticProbe(num_layers=4), Progress())
    importance = Importance(per_head=torch.rand(4, 2), per_layer=torch.rand(4))
    said = found.document(importance)["correlation"]
    assert said["per_layer"] == pytest.approx(spearmanr(importance.per_layer, found.increase).statistic)
    assert said["mean of per_head"] == pytest.approx(spearmanr(importance.per_head.mean(1), found.increase).statistic)
    alone = Importance(per_head=torch.ones(4, 2))
    assert list(layer_importance(alone)) == ["mean of per_head"]
    assert found.document(alone)["correlation"] == {"mean of per_head": None}


@pytest.mark.parametrize("head_input", ["value", "proj", "proj_residual"])
def test_importance_is_one_minus_the_mean_of_the_token_maps(head_input):
    estimator, probe = CosineEstimator(head_input=head_input), SyntheticProbe()
    maps = estimator.token_maps(probe)
    assert [tuple(values.shape) for values in maps] == [(3, 6, 24), (3, 6, 33)]
    by_prompt = [1 - values[..., 1:].mean(-1).reshape(3, 2, 3).mean(-1) for values in maps]
    torch.testing.assert_close(estimator.estimate(probe).per_head, torch.stack(by_prompt).mean(0).clamp(min=0))


def test_the_laws_hold_the_shape_of_token_maps():
    @dataclass(frozen=True, slots=True)
    class Transposed(CosineEstimator):
        def token_maps(self, probe):
            return [values.mT for values in CosineEstimator.token_maps(self, probe)]

    check_estimator(CosineEstimator)
    with pytest.raises(LawError, match="token map has shape"):
        check_estimator(Transposed)


# --- the verb


def test_profile_with_agreement(kvpolicy, tiny_checkpoint, tiny_text, tmp_path):
    out, png = tmp_path / "found.json", tmp_path / "found.png"
    options = ["--agreement", "--estimator", "cosine", "--estimator", "entropy", "--context", "64"]
    result = kvpolicy(
        "profile", "--model", tiny_checkpoint, "--text", tiny_text, *options, "--out", out, "--png", png, "--json"
    )
    found = result.json
    assert len(found["estimators"]) == 6 and found["estimators"][-1] == "entropy"
    assert [len(found[key]) for key in ("texts", "prompts", "across_estimators")] == [4, 6, 6]
    assert found["texts"][0].startswith(tiny_text.name)
    # 6 estimators x (4 texts of 6 prompts and 6 prompts)
    assert "6 rankings run at most 180 forwards of up to 64 tokens" in result.err
    assert json.loads(out.read_text()) == found and png.read_bytes().startswith(b"\x89PNG")
    table = kvpolicy("profile", "--model", tiny_checkpoint, "--text", tiny_text, *options).out
    assert "cosine head_input=slice" in table and "Spearman" in table


def test_profile_draws_token_maps_and_layers_besides(kvpolicy, tiny_checkpoint, tiny_text, tmp_path):
    plain = ["profile", "--model", tiny_checkpoint, "--text", tiny_text, "--context", "64", "--json"]
    pictures = [tmp_path / "map.png", tmp_path / "layers.png"]
    result = kvpolicy(*plain, "--token-map", pictures[0], "--layers", pictures[1])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "--layers runs 12 forwards of 64 tokens" in result.err
    found = result.json
    layers = found.pop("layers")
    assert (layers["capacity"], layers["sequences"], len(layers["loss_increase"])) == (8, 4, 2)
    assert found == kvpolicy(*plain).json


def test_texts_of_one_name_are_refused(refused, tiny_checkpoint, tiny_text):
    twice = ["--text", tiny_text, "--text", tiny_text, "--context", "64", "--agreement"]
    line = refused("profile", "--model", tiny_checkpoint, *twice)
    assert f"two texts are called {tiny_text.name}" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--token-map x.png --estimator entropy", "the estimator 'entropy' has no value for each token; these have:"),
        ("--agreement --layers x.png", "--agreement draws with --png"),
        ("--estimator cosine --estimator entropy", "--estimator was given 2 times: only --agreement takes more"),
        ("--text a --text b", "--text was given 2 times"),
        ("--agreement --param group=max", "--param is of one estimator, and there are 4: cosine"),
        ("--layers no/x.png", "cannot write no/x.png"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(refused, options, said):
    assert said in refused("profile", "--model", "no-such-model", *options.split())
