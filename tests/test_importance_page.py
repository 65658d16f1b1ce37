"""The figures of the page about importance are those of the committed runs that it names."""

import itertools
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = " ".join((ROOT / "docs" / "how-to" / "look-at-importance.md").read_text(encoding="utf-8").split())


def run(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def mean_and_least(matrix):
    pairs = [matrix[i][j] for i, j in itertools.combinations(range(len(matrix)), 2)]
    return f"{sum(pairs) / len(pairs):.2f} | {min(pairs):.2f}"


def test_rankings_agree_as_the_page_says():
    agreement = run("agreement_cpu.json")
    for name in agreement["estimators"]:
        prompts, texts = (mean_and_least(agreement[which][name]) for which in ("across_prompts", "across_texts"))
        assert f"| `{name}` | {prompts} | {texts} |" in PAGE
    cosine = dict(zip(agreement["estimators"], agreement["across_estimators"][0], strict=True))
    said = "`cosine` has {retrieval:.2f} with `retrieval`, {layer_cosine:.2f} with `layer_cosine`, and {entropy:.2f}"
    assert said.format(**cosine) in PAGE


def test_layers_cost_what_the_page_says():
    document = run("layers_cpu.json")
    measured, importance = document["layers"], document["per_layer"]
    ranks = measured["correlation"]
    assert f"a rank correlation of {ranks['per_layer']:.2f} with the measured cost" in PAGE
    assert f"importance of the KV heads has {ranks['mean of per_head']:.2f}," in PAGE
    median = sum(sorted(importance)[14:16]) / 2
    largest = sorted(range(30), key=importance.__getitem__)[:-4:-1]
    assert largest == [0, 1, 24] and [round(importance[layer] / median) for layer in largest] == [30, 12, 9]
    cost = measured["loss_increase"]
    assert max(cost[0], cost[1]) < cost[14] / 2 and round(importance[14] / median, 1) == 0.8
    assert sum(increase < 1e-4 for increase in cost) == 3
