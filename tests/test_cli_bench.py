"""`kvpolicy bench`: who is timed and weighed, and that a repeat's order is fair."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

import kvpolicy as package
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers.attention.attachment import is_attached
from kvpolicy.integrations.transformers.probes import decode_cost
from kvpolicy.integrations.transformers.probes.decode_cost import DENSE, DecodeCost, measure_decode
from kvpolicy.verbs import bench as verb
from tests.tiny import over, tiny_ids, tiny_model
from tests.tiny_checkpoint import save_tiny_falcon

LAYERS, HEADS, ENTRY = 2, 2, (8 + 8) * 4


@pytest.fixture
def bench(tiny_checkpoint, tiny_text):
    """The arguments of a short run; later ones win."""
    sizes = ["--context", "200", "--new-tokens", "5", "--repeats", "3", "--min-tokens", "16"]
    return ["bench", "--model", tiny_checkpoint, "--text", tiny_text, "--device", "cpu", *sizes]


def test_json_is_one_object_with_every_repeat(kvpolicy, bench):
    found = kvpolicy(*bench, "-r", "0.5", "-r", "0.25", "--json").json
    assert (found["context_length"], found["new_tokens"], found["repeats"], found["device"]) == (200, 5, 3, "cpu")
    dense, *caches = [found["dense"], *found["caches"]]
    assert dense["cache"] == DENSE
    assert (dense["token_ratio"], dense["first_token_ratio"], dense["bytes_ratio"]) == (1, 1, 1)
    assert dense["bytes"] == 205 * LAYERS * HEADS * ENTRY
    assert [row["retention"] for row in caches] == [0.5, 0.25]
    for row in caches:
        assert row["entries"] == round(row["retention"] * 200 * LAYERS * HEADS)
        assert row["entries_seen"] == 205 * LAYERS * HEADS
        assert row["evicted"] is True
        assert row["entries"] * ENTRY < row["bytes"] == round(row["bytes_ratio"] * dense["bytes"]) < dense["bytes"]
        assert (row["decoding"], row["why"]) == ("eager", "the model is on cpu, CUDA graphs need a CUDA device")
    for row in (dense, *caches):
        times = sorted(row["ms_per_token_of_each_repeat"])
        assert len(times) == 3 and row["ms_per_token"] == times[1] > 0
        assert row["first_token_seconds"] > 0
        assert "peak_bytes" in row  # None where nothing that small is seen


def test_a_policy_that_has_the_context_repeated(kvpolicy, bench):
    (row,) = kvpolicy(*bench, "-r", "0.5", "--policy", "kvzip", "--repeats", "1", "--json").json["caches"]
    assert row["entries"] == round(0.5 * 200 * LAYERS * HEADS) and row["evicted"] is True


def test_a_plan_is_timed_at_its_levels(kvpolicy, bench, tuned):
    result = kvpolicy(*bench, tuned[0], "--repeats", "1")
    assert result.code == 0
    for said in (DENSE, "plan.json 0.5", "plan.json 0.3"):
        assert said in result.out
    assert "medians of 1" in result.out
    assert f"bench: {DENSE}: " in result.err


def test_full_and_quiet(kvpolicy, bench):
    result = kvpolicy(*bench, "full", "--repeats", "1", "--json", "--quiet")
    assert result.err == ""
    (row,) = result.json["caches"]
    assert (row["retention"], row["kept"], row["evicted"]) == (None, 1.0, False)


def test_a_prompt_that_is_kept_whole_is_said_to_be(kvpolicy, bench):
    result = kvpolicy(*bench, "-r", "0.3", "--repeats", "1", "--context", "64", "--min-tokens", "128")
    assert "uniform 0.3: nothing was evicted (--min-tokens keeps short prompts)" in result.out


def test_a_text_that_is_too_short_is_repeated(kvpolicy, bench):
    found = kvpolicy(*bench, "full", "--repeats", "1", "--context", "9000", "--new-tokens", "1", "--json").json
    assert found["dense"]["bytes"] == 9001 * LAYERS * HEADS * ENTRY


def test_a_gpu_on_which_nothing_was_replayed_is_told(kvpolicy, bench, monkeypatch):
    own = verb.bench

    def on_a_gpu(*args, **options):
        answer = own(*args, **options)
        return dataclasses.replace(answer, run=answer.run | {"device": "NVIDIA H200"})

    monkeypatch.setattr(verb, "bench", on_a_gpu)
    said = kvpolicy(*bench, "full", "--repeats", "1").out
    assert "full: decoded without a CUDA graph: the model is on cpu, CUDA graphs need a CUDA device" in said


WRONG = {
    "--retention 0": "--retention is the fraction that is kept, in (0, 1]; got 0",
    "full --retention 0.3": "full keeps everything; leave --retention out",
    "--context 0": "--context must be at least 16 tokens, got 0",
    "--repeats 0": "Invalid value for '--repeats'",
    "--new-tokens 0": "Invalid value for '--new-tokens'",
    "--policy steaming": "did you mean 'streaming'?",
    "--allocator baklava": "run 'kvpolicy tune' with it and give the plan",
    "--text nowhere.txt": "cannot read the text nowhere.txt",
    "nowhere.json": "plan file 'nowhere.json': cannot be read: No such file or directory",
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.items(), ids=WRONG)
def test_a_wrong_option(refused, bench, arguments, expected):
    assert expected in refused(*bench, *arguments.split())


def test_a_plan_or_a_model_that_cannot_be_run(refused, bench, tuned, tiny_text, tmp_path):
    assert "retention 0.1 is below the plan's lowest level" in refused(*bench, tuned[0], "-r", "0.1")
    falcon = save_tiny_falcon(tmp_path / "falcon")
    assert "Falcon" in refused("bench", "--model", falcon, "--text", tiny_text)


# --- the measuring function


@pytest.fixture
def steps(monkeypatch):
    """What was run, in order: (cache, tokens of the forward, whether the model was attached)."""
    seen = []
    run = decode_cost._run

    def spy(model, ids, prompt, make, cost, tokenizer):
        run(model, ids, prompt, make, cost, tokenizer)
        seen.append((cost.name, ids.shape[1], is_attached(model)))

    monkeypatch.setattr(decode_cost, "_run", spy)
    return seen


def test_caches_take_turns_and_the_stock_one_runs_on_the_stock_model(steps):
    model, ids = tiny_model("Llama"), tiny_ids(40)
    make = {name: lambda: package.new_cache(model, retention=0.5, min_tokens=8) for name in ("a", "b")}
    costs = measure_decode(model, ids, make, new_tokens=3, repeats=3)
    assert [cost.name for cost in costs] == [DENSE, "a", "b"]
    warm_up, timed = steps[:3], steps[3:]
    assert [length for _, length, _ in warm_up] == [39, 39, 39]
    order = [DENSE, "a", "b", "a", "b", DENSE, "b", DENSE, "a"]
    assert timed == [(name, 40, name != DENSE) for name in order]
    assert not is_attached(model)
    assert all(len(cost.token_seconds) == len(cost.first_token_seconds) == 3 for cost in costs)


def test_an_attached_model_stays_attached():
    model = tiny_model("Llama")
    package.attach(model)
    measure_decode(model, tiny_ids(20), {}, new_tokens=2, repeats=1)
    assert is_attached(model)


def test_every_layer_of_a_stock_cache_is_weighed():
    model, ids = tiny_model("Gemma3Window"), tiny_ids(60)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **over(cache))
    (dense,) = measure_decode(model, ids, {}, new_tokens=4, repeats=1)
    assert dense.bytes >= sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_ratios_are_of_the_figures_that_are_shown():
    slow, fast = DecodeCost("slow", token_seconds=[2, 40, 6]), DecodeCost("fast", token_seconds=[1, 10, 2.5])
    assert slow.token_ratio(fast) == 6 / 2.5
    assert slow.median_token_seconds == 6


def test_a_first_token_is_known_behind_the_prompt_and_the_largest_peak_counts(monkeypatch):
    class Counted(decode_cost.PeakMemory):
        peaks = iter([1, 1, 7, 5, None, 9, 4, None])  # the first two are of the caches' warm-up

        def measure(self):
            return next(self.peaks)

    moments = iter(range(100))
    monkeypatch.setattr(decode_cost, "PeakMemory", Counted)
    monkeypatch.setattr(decode_cost, "seconds_now", lambda ids: float(next(moments)))
    model = tiny_model("Llama")
    make = {"a": lambda: package.new_cache(model, retention=0.5, min_tokens=8)}
    dense, ours = measure_decode(model, tiny_ids(40), make, new_tokens=4, repeats=3)
    assert (dense.peaks, dense.peak_bytes) == ([7, 9, 4], 9)
    assert (ours.peaks, ours.peak_bytes) == ([5, None, None], 5)
    assert dense.first_token_seconds == [1, 1, 1] and dense.token_seconds == [0.25] * 3
    assert dense.first_token_ratio(ours) == 1


@pytest.mark.parametrize(("length", "new_tokens"), [(8, 8), (8, 9), (8, 0)])
def test_an_input_without_a_prompt_is_refused(length, new_tokens):
    with pytest.raises(BudgetError, match=f"{length} tokens hold no prompt"):
        measure_decode(tiny_model("Llama"), tiny_ids(length), {}, new_tokens=new_tokens)
