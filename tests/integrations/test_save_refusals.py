"""What cannot be saved or loaded is refused: the error names the file and what is wrong with it."""

import dataclasses
import errno
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import kvpolicy
from kvpolicy import BudgetError, KVPolicyError, ModelError, PlanError, PluginError, registry
from kvpolicy.integrations.transformers.cache import save
from tests.integrations.saving import LENGTH, PROMPT, assert_same, facts, feed, left_padded, plan_of
from tests.tiny import tiny_ids, tiny_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    """(path, plan) of a saved cache that grows under a plan."""
    path, plan = tmp_path_factory.mktemp("saved") / "cache.safetensors", plan_of(llama)
    cache = kvpolicy.new_cache(llama, plan, retention=0.3, min_tokens=8)
    feed(llama, cache, tiny_ids(LENGTH, batch=2), [PROMPT, 1], left_padded(2))
    cache.save(path)
    return path, plan


def parts(path):
    with safe_open(path, "pt") as opened:
        document = json.loads(opened.metadata()["kvpolicy"])
        return document, {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def rewritten(path, folder, change):
    """A file whose document and tensors were changed, its checksum right again."""
    document, tensors = parts(path)
    change(document, tensors)
    document.pop("crc32", None)
    (folder / "changed.safetensors").write_bytes(save.file_bytes(document, tensors))
    return folder / "changed.safetensors"


def error_of(call):
    with pytest.raises(KVPolicyError) as caught:
        call()
    return caught.value


def set_in(*path):
    """A change of one value of the document, the last of `path`."""

    def change(document, _):
        for key in path[:-2]:
            document = document[key]
        document[path[-2]] = path[-1]

    return change


def add_to(name, amount, at=0):
    """A change of one element of a tensor."""

    def change(_, tensors):
        tensors[name].view(-1)[at] += amount

    return change


def tensor_is(name, value):
    return lambda _, tensors: tensors.update({name: value})


def without(name):
    return lambda _, tensors: tensors.pop(name)


REFUSED = {
    "format": (set_in("format", "kvpolicy-plan"), KVPolicyError, "format is 'kvpolicy-plan', expected"),
    "version": (set_in("version", 4), KVPolicyError, "version is 4, expected 3"),
    "an older version": (set_in("version", 1), KVPolicyError, "version is 1, expected 3: read the text again into"),
    "an older format": (set_in("version", 2), KVPolicyError, "version is 2, .* the kvpolicy that wrote it"),
    "no version": (lambda d, _: d.pop("version"), KVPolicyError, "damaged: version is missing"),
    "model type": (set_in("model", "model_type", "qwen3"), ModelError, "a model of type qwen3, this one has llama"),
    "table shape": (set_in("model", "table_shape", [3, 4]), ModelError, r"heads\) \[3, 4\], this one has \[3, 2\]"),
    "configuration": (set_in("model", "config_sha256", "0" * 64), ModelError, "the configurations differ"),
    "dtype": (set_in("model", "dtype", "bfloat16"), ModelError, "are bfloat16, the model is float32"),
    "ranks": (set_in("store", "heads", [1, 1]), ModelError, "holds 1 KV heads from head 1 on"),
    "policy": (set_in("recipe", "policy", "name", "streamin"), PluginError, "no policy named 'streamin'"),
    "class": (set_in("recipe", "policy", "class", "a.B"), PluginError, "StreamingPolicy here, but was a.B"),
    "params": (set_in("recipe", "policy", "params", {"sinks": 1}), PluginError, "no parameter 'sinks'"),
    "decode": (set_in("recipe", "decode", "drop"), PlanError, "recipe.decode is 'drop'"),
    "span": (set_in("recipe", "protected", [[4, 1]]), BudgetError, "protected span"),
    "retention": (set_in("recipe", "retention", 0.01), PlanError, "below the plan's lowest level"),
    "rows": (set_in("store", "rows", [0, 7]), KVPolicyError, "sequence 1 has table 7, but there are 2"),
    "no rows": (set_in("store", "rows", []), KVPolicyError, "it holds no sequence"),
    "row of seen": (set_in("store", "seen", [48]), KVPolicyError, "store.seen has 1 items, expected 2"),
    "layers": (set_in("store", "layers", []), KVPolicyError, r"store.layers has 0 items, expected 3"),
    "a layer": (set_in("store", "layers", 1, None), KVPolicyError, "a layer is missing|belongs to nothing"),
    "decoded": (set_in("store", "layers", 0, "decoded", -1), KVPolicyError, "decoded is -1"),
    "columns": (set_in("columns", [49, 50, 49]), KVPolicyError, "different numbers of columns"),
    "few columns": (
        set_in("columns", [40, 40, 40]),
        KVPolicyError,
        r"columns\[0\] is 40, expected a whole number from",
    ),
    "holes": (set_in("has_holes", 0), KVPolicyError, "has_holes is 0, expected a list"),
    "some holes": (set_in("has_holes", [True, False, False]), KVPolicyError, "or padding"),
    "which holes": (set_in("has_holes", [True] * 3), KVPolicyError, "tensor 'filled' is missing"),
    "recording": (set_in("recording", None), KVPolicyError, "recording is null"),
    "ended": (set_in("ended", 3), KVPolicyError, "ended is 3, expected a text"),
    "stock": (set_in("stock", []), ModelError, "saved under transformers .* with 0 layers"),
    "kind of layer": (set_in("stock", 0, {"class": "X", "state": {}}), KVPolicyError, "budgeted in the file or in the"),
    "missing": (without("layers.1.keys"), KVPolicyError, "tensor 'layers.1.keys' is missing"),
    "surplus": (tensor_is("more", torch.ones(1)), KVPolicyError, "tensor 'more' belongs to nothing"),
    "unfed": (
        tensor_is("unfed", torch.ones(3, 1, dtype=torch.int64)),
        KVPolicyError,
        r"'unfed' is .*expected.*\[2, n\]",
    ),
    "a token that is none": (
        tensor_is("unfed", torch.tensor([[1], [97]])),
        KVPolicyError,
        r"'unfed' holds ids outside 0 to 96",
    ),
    "heads": (tensor_is("layers.0.table", torch.ones(2, 4)), KVPolicyError, r"\[2, 4\], expected torch.int64 \[2, 2\]"),
    "half": (lambda _, t: t.update({"layers.0.keys": t["layers.0.keys"].half()}), KVPolicyError, "is torch.float16"),
    "longer": (add_to("layers.0.length", 1), KVPolicyError, "'layers.0.(length|keys)' is"),
    "too long": (add_to("layers.0.length", 10**9), KVPolicyError, "'layers.0.length' is"),
    "negative": (add_to("layers.0.length", -(10**9)), KVPolicyError, "'layers.0.length' is"),
    "capacity": (add_to("layers.0.table", -10), KVPolicyError, "'layers.0.table' is|'layers.0.length' is"),
    "huge capacity": (add_to("layers.0.table", 2**40), KVPolicyError, "'layers.0.table' is"),
    "seen": (add_to("layers.0.seen", 1), KVPolicyError, "seen different numbers of tokens"),
    "evicted": (add_to("layers.0.evicted_at", 10**6), KVPolicyError, "'layers.0.evicted_at' is"),
    "position": (add_to("layers.0.positions", 10**6), KVPolicyError, "'layers.0.positions' is"),
    "twice": (add_to("layers.0.positions", 1), KVPolicyError, "'layers.0.positions' does not rise within a KV head"),
    "another order": (
        lambda _, t: t["layers.0.positions"][:2].copy_(t["layers.0.positions"][:2].flip(0)),
        KVPolicyError,
        "'layers.0.positions' does not rise",
    ),
    "not finite": (
        add_to("layers.2.values", float("nan")),
        KVPolicyError,
        "'layers.2.values' holds numbers that are not",
    ),
    "table": (add_to("rows", 2**40), KVPolicyError, "'rows' is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case, llama, file, tmp_path):
    change, kind, reason = REFUSED[case]
    path = rewritten(file[0], tmp_path, change)
    error = error_of(lambda: kvpolicy.load_cache(llama, path, file[1]))
    assert type(error) is kind
    assert str(error).startswith(f"cache file '{path}': ")
    with pytest.raises(KVPolicyError, match=reason):
        raise error


def test_a_file_that_was_rewritten_without_a_change_is_loaded(llama, file, tmp_path):
    path = rewritten(file[0], tmp_path, lambda *_: None)
    assert kvpolicy.load_cache(llama, path, file[1]).get_seq_length() == PROMPT + 1


STOCK_REFUSED = {
    "class": (set_in("stock", 0, "class", "Quantized"), ModelError, "is Quantized, this transformers uses Dynamic"),
    "attribute": (set_in("stock", 0, "state", "update", 1), ModelError, "stock.0..state.update is an attribute"),
    "missing": (lambda d, _: d["stock"][0]["state"].pop("record_past"), ModelError, "record_past is missing"),
    "setting": (set_in("stock", 0, "state", "sliding_window", 7), KVPolicyError, "is 7, but a fresh layer has 32"),
    "kind": (set_in("stock", 0, "state", "record_past", 1), KVPolicyError, "is 1, but a fresh layer has False"),
    "text": (set_in("stock", 0, "state", "cumulative_length", "x"), KVPolicyError, "is 'x', but a fresh layer has 0"),
    "length": (set_in("stock", 0, "state", "cumulative_length", 3), KVPolicyError, "has seen 3 columns, others 49"),
    "keys": (
        lambda _, t: t.update({"stock.0.keys": t["stock.0.keys"][:1]}),
        KVPolicyError,
        r"stock\[0\].state.keys does not fit: expected torch.float32 \[2, 2, up to 49, dim\]",
    ),
}


@pytest.mark.parametrize("case", STOCK_REFUSED)
def test_a_stock_layer_that_does_not_fit_is_refused(case, tmp_path):
    model = tiny_model("Gemma3Window")
    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=8)
    feed(model, cache, tiny_ids(LENGTH, batch=2), [PROMPT, 1])
    cache.save(tmp_path / "cache.safetensors")
    change, kind, reason = STOCK_REFUSED[case]
    path = rewritten(tmp_path / "cache.safetensors", tmp_path, change)
    with pytest.raises(kind, match=reason):
        kvpolicy.load_cache(model, path)


def test_pending_tokens_that_do_not_fit_are_refused(llama, tmp_path):
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, rollback=6)
    cache.activate_past_recording()
    feed(llama, cache, tiny_ids(LENGTH), [PROMPT])
    cache.save(tmp_path / "cache.safetensors")
    path = rewritten(tmp_path / "cache.safetensors", tmp_path, add_to("layers.1.pending.positions", 1))
    with pytest.raises(KVPolicyError, match=r"'layers.1.pending.positions' is"):
        kvpolicy.load_cache(llama, path)


def test_a_plan_must_be_the_one_of_the_cache(llama, file, tmp_path):
    path, plan = file
    with pytest.raises(PlanError, match=r"give that plan again with plan= \(sha256 [0-9a-f]{64}\)"):
        kvpolicy.load_cache(llama, path)
    with pytest.raises(PlanError, match="made under another plan"):
        kvpolicy.load_cache(llama, path, plan_of(llama, levels=(0.2, 0.6)))
    kvpolicy.save_plan(plan, tmp_path / "plan.json")
    kvpolicy.load_cache(llama, path, kvpolicy.load_plan(tmp_path / "plan.json"))
    cache = kvpolicy.new_cache(llama, retention=0.3)
    feed(llama, cache, tiny_ids(9), [9])
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(PlanError, match="made without a plan"):
        kvpolicy.load_cache(llama, tmp_path / "cache.safetensors", plan)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: tiny_model("Qwen3"), "a model of type llama, this one has qwen3"),
        (lambda: tiny_model("Llama", layers=2), r"heads\) \[3, 2\], this one has \[2, 2\]"),
        (lambda: tiny_model("Llama", rope_theta=500.0), "the configurations differ"),
        (lambda: tiny_model("Llama").bfloat16(), "are float32, the model is bfloat16"),
    ],
)
def test_another_model_is_refused(other, reason, file):
    with pytest.raises(ModelError, match=reason):
        kvpolicy.load_cache(other(), file[0], file[1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or no cache"),
        (b'{"format": "kvpolicy-plan"}', "damaged or no cache"),
        (b"\xff" * 64, "damaged or no cache"),
        (b"\x02" + b"\0" * 7 + b"{}", "another safetensors file"),
    ],
)
def test_a_foreign_file_is_refused(content, reason, llama, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(KVPolicyError, match=rf"cache file '.*file': .*{reason}"):
        kvpolicy.load_cache(llama, tmp_path / "file")


def test_what_is_no_file_is_refused(llama, tmp_path):
    with pytest.raises(KVPolicyError, match="cannot be read: No such file"):
        kvpolicy.load_cache(llama, tmp_path / "nothing")
    with pytest.raises(KVPolicyError, match="cannot be read: Is a directory"):
        kvpolicy.load_cache(llama, tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(KVPolicyError, match="another safetensors file"):
        kvpolicy.load_cache(llama, tmp_path / "weights.safetensors")


def test_a_file_that_was_cut_off_is_refused(llama, file, tmp_path):
    content = file[0].read_bytes()
    for length in (7, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(KVPolicyError, match="damaged or no cache"):
            kvpolicy.load_cache(llama, tmp_path / "cut", file[1])


@settings(max_examples=80, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), in_header=st.booleans())
def test_one_byte_that_differs_is_noticed(llama, file, tmp_path_factory, place, value, in_header):
    content = bytearray(file[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    at = int(place * header) if in_header else header + int(place * (len(content) - header))
    content[at] ^= value
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        loaded = kvpolicy.load_cache(llama, path, file[1])
    except KVPolicyError as error:
        assert str(error).startswith(f"cache file '{path}': ")
    else:  # white space between two fields
        assert_same(facts(loaded), facts(kvpolicy.load_cache(llama, *file)))


def test_what_cannot_be_saved_says_why(llama, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Unknown(registry.get("policy", "streaming")):
        pass

    path = tmp_path / "cache.safetensors"
    with pytest.raises(ModelError, match="the cache was not saved: this cache is empty"):
        kvpolicy.new_cache(llama, retention=0.3).save(path)
    cache = kvpolicy.new_cache(llama, retention=0.3, policy=Unknown())
    feed(llama, cache, tiny_ids(9), [9])
    with pytest.raises(PluginError, match=r"the policy .*Unknown is not registered"):
        cache.save(path)
    cache = kvpolicy.new_cache(llama, retention=0.3)
    feed(llama, cache, tiny_ids(9), [9])
    cache.layers[0].update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    with pytest.raises(ModelError, match=r"in the middle of a forward|not their attention"):
        cache.save(path)
    cache = kvpolicy.new_cache(llama, retention=0.3)
    feed(llama, cache, tiny_ids(9), [9])
    cache.store.layers[1].arena.keys[3] = float("inf")
    with pytest.raises(KVPolicyError, match="keys or values that are not finite"):
        cache.save(path)
    assert not path.exists()


def test_a_failed_write_leaves_the_old_file(llama, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8)
    feed(llama, cache, tiny_ids(LENGTH), [PROMPT])
    cache.save(path)
    before = path.read_bytes()
    feed(llama, cache, tiny_ids(LENGTH), [1])

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(KVPolicyError, match=r"the cache was not saved: cannot write .*: No space left"):
        cache.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KVPolicyError, match=r"the cache was not saved: cannot write"):
        cache.save(tmp_path / "nowhere" / "cache.safetensors")
