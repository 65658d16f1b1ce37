"""Sequences that join and leave: each is given the tokens that it is given alone, whatever its neighbours do."""

import pytest
import torch
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat

import kvpolicy
from kvpolicy import BudgetError, ModelError
from kvpolicy.budget.entry_format import LayerFormats, least_entries
from kvpolicy.cache.extents import Extents
from kvpolicy.cache.schedule import Fixed
from kvpolicy.integrations.transformers.cache.build import cache_of, schedule_of
from tests.integrations.recording import record_on_cpu
from tests.tiny import attention_of, tiny_ids, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

copies = pytest.mark.skipif(DEVICE == "cuda", reason="its forward copies from the host, which no graph holds")


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama").to(DEVICE)


def cache_over(model, policy="streaming", **options):
    options = {"retention": 0.4, "allocator": "pyramid", "min_tokens": 8} | options
    return kvpolicy.new_cache(model, policy=policy, **options)


def prompt(length):
    return tiny_ids(length)[:, :length].to(DEVICE)


def alone(model, ids, count, **options):
    """Under the capacities that its budget has once all tokens are there."""
    recipe = cache_over(model, **options).recipe
    spec = kvpolicy.ModelSpec.from_config(model.config)
    schedule = schedule_of(recipe, spec).with_floor(least_entries(recipe.policy, recipe.entry_format))
    cache = cache_of(model, recipe, Fixed(schedule.at(ids.shape[1] + count, None)))
    return kvpolicy.DecodeRunner(model, cache).generate(ids, count)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
@pytest.mark.parametrize("replayed", [False, True])
def test_each_sequence_is_as_alone(policy, replayed, model, monkeypatch):
    """Nine sequences of many lengths over three slots, with room for fewer where they are long."""
    if replayed and DEVICE == "cpu":
        record_on_cpu(monkeypatch)
    wishes = [(40, 30), (12, 5), (70, 20), (30, 1), (9, 40), (60, 25), (25, 25), (50, 10), (18, 30)]
    runner = kvpolicy.SlotRunner(model, cache_over(model, policy), slots=3, tokens=75)
    found = {runner.admit(prompt(length), count): [] for length, count in wishes}
    most = 0
    for _ in range(400):
        if not (runner.running or runner.waiting):
            break
        for number, token in runner.step().items():
            found[number].append(token)
        most = max(most, len(runner.running))
    assert most == 3
    for (length, count), tokens in zip(wishes, found.values(), strict=True):
        assert tokens == alone(model, prompt(length), count, policy=policy), (length, count)
    if replayed or DEVICE == "cuda":
        assert runner.cache.replays.mode == "graph"


FORMATS = {
    "int8": ("snapkv", INT8),
    "int4": ("snapkv", EntryFormat(4, rotated=True, exact_recent=5)),
    "think": ("streaming", EntryFormat(16, exact_recent=5, key_channels=0.6)),
    "a format for each layer": ("streaming", LayerFormats((INT4, None, INT8))),
}


@pytest.mark.parametrize(("policy", "entry_format"), FORMATS.values(), ids=FORMATS)
def test_each_sequence_is_as_alone_under_a_format(policy, entry_format, model, monkeypatch):
    """A prompt shorter than what stays exact among them; rows that move when a sequence leaves."""
    if DEVICE == "cpu":
        record_on_cpu(monkeypatch)
    options, wishes = {"policy": policy, "format": entry_format}, [(40, 20), (12, 3), (60, 9), (3, 30), (50, 12)]
    runner = kvpolicy.SlotRunner(model, cache_over(model, **options), slots=2, tokens=70)
    found = {runner.admit(prompt(length), count): [] for length, count in wishes}
    while runner.running or runner.waiting:
        for number, token in runner.step().items():
            found[number].append(token)
    for (length, count), tokens in zip(wishes, found.values(), strict=True):
        assert tokens == alone(model, prompt(length), count, **options), (length, count)
    assert runner.cache.replays.mode == "graph"


def test_keys_that_are_encoded_less_a_centre(monkeypatch):
    if DEVICE == "cpu":
        record_on_cpu(monkeypatch)
    model, own = tiny_model("Qwen2").to(DEVICE), EntryFormat(4, rotated=True, centred=True, exact_recent=5)
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.data.mul_(100)
    runner = kvpolicy.SlotRunner(model, cache_over(model, format=own), slots=2, tokens=70)
    found = {runner.admit(prompt(length), 15): [] for length in (40, 25)}
    while runner.running or runner.waiting:
        for number, token in runner.step().items():
            found[number].append(token)
    assert [*found.values()] == [alone(model, prompt(length), 15, format=own) for length in (40, 25)]


def test_released_sequences_make_room(model):
    runner = kvpolicy.SlotRunner(model, cache_over(model), slots=2, tokens=60)
    first, second, third = (runner.admit(prompt(40), 20) for _ in range(3))
    assert set(runner.step()) == {first, second}
    assert runner.waiting == (third,)
    runner.release(first)
    assert set(runner.step()) == {second, third}
    runner.release(third)
    fourth = runner.admit(prompt(20), 20)
    tokens = []
    while fourth in (*runner.running, *runner.waiting):
        tokens += [token for number, token in runner.step().items() if number == fourth]
    assert tokens == alone(model, prompt(20), 20)
    with pytest.raises(ModelError, match=f"sequence {first} is not there"):
        runner.release(first)


def test_what_slots_cannot_serve_is_refused(model):
    with pytest.raises(BudgetError, match="H2OPolicy changes its scores"):
        kvpolicy.SlotRunner(model, cache_over(model, "h2o"), slots=2, tokens=60)
    with pytest.raises(BudgetError, match="AdaKVAllocator splits the budget at run time"):
        kvpolicy.SlotRunner(model, cache_over(model, "snapkv", allocator="adakv"), slots=2, tokens=60)
    with pytest.raises(BudgetError, match="leave protected= and decode= out"):
        kvpolicy.SlotRunner(model, cache_over(model, protected=[(0, 3)]), slots=2, tokens=60)
    with pytest.raises(BudgetError, match="must be at least 1, got 0 and 60"):
        kvpolicy.SlotRunner(model, cache_over(model), slots=0, tokens=60)
    runner = kvpolicy.SlotRunner(model, cache_over(model), slots=1, tokens=60)
    with pytest.raises(BudgetError, match=r"of 90 \+ 90 tokens keeps .* more than all slots"):
        runner.admit(prompt(90), 90)
    with pytest.raises(ModelError, match="at least one token to come"):
        runner.admit(prompt(9), 0)
    chunked = tiny_model("Llama4", attention=attention_of("Llama4")).to(DEVICE)
    with pytest.raises(ModelError, match=r"layers of other kinds \(.*\), whose caches slots cannot hold"):
        kvpolicy.SlotRunner(chunked, cache_over(chunked), slots=1, tokens=60)
    scaled = tiny_model("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ModelError, match=r"longest of all sequences \(rope_type 'dynamic'\).*DecodeRunner"):
        kvpolicy.SlotRunner(scaled, cache_over(scaled), slots=1, tokens=60)


def longrope(name):
    """Turned in another way beyond 48 tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 48, **factors}
    more = {"original_max_position_embeddings": 48} if name == "Phi3" else {}
    return tiny_model(name, rope_parameters=rope, max_position_embeddings=192, **more).to(DEVICE)


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
@pytest.mark.parametrize("name", ["Phi3", "Llama"])
@pytest.mark.parametrize("replayed", [False, True])
def test_short_and_long_texts_under_longrope(name, replayed, monkeypatch):
    """Each is turned by its own length, beside longer and shorter ones; one that would pass the limit is refused."""
    if replayed and DEVICE == "cpu":
        record_on_cpu(monkeypatch)
    turned = longrope(name)
    wishes = [(40, 9), (70, 25), (12, 5), (90, 10), (20, 29), (49, 12)]
    wishes += [(40, 30)] if name == "Llama" else []  # Phi-3 would begin again there
    runner = kvpolicy.SlotRunner(turned, cache_over(turned), slots=3, tokens=110)
    found = {runner.admit(prompt(length), count): [] for length, count in wishes}
    if name == "Phi3":
        with pytest.raises(ModelError, match=r"40 \+ 10 tokens were asked for. Ask for 9 at most"):
            runner.admit(prompt(40), 10)
    while runner.running or runner.waiting:
        for number, token in runner.step().items():
            found[number].append(token)
    assert list(found.values()) == [alone(turned, prompt(length), count) for length, count in wishes]
    assert not any("forward" in vars(module) for module in turned.modules() if module is not turned)
    if replayed and DEVICE == "cpu":  # 5.17 looks at the length, which no graph holds
        assert runner.cache.replays.mode == "graph"


@pytest.mark.parametrize(
    "name", ["Gemma3Window", "Gemma2Window", "Qwen2Window", pytest.param("GptOssWindow", marks=copies)]
)
@pytest.mark.parametrize("replayed", [False, True])
def test_layers_with_a_sliding_window(name, replayed, monkeypatch):
    """Prompts shorter and longer than the window, answers that go round it; a seat that was another's before."""
    if replayed and DEVICE == "cpu":
        record_on_cpu(monkeypatch)
    hybrid = tiny_model(name, attention=attention_of(name)).to(DEVICE)
    wishes = [(3, 30), (40, 12), (17, 25), (1, 9), (50, 20)]
    runner = kvpolicy.SlotRunner(hybrid, cache_over(hybrid, "snapkv"), slots=2, tokens=70)
    assert all(ring.entries[0].shape[0] == 2 for ring in runner.cache.rings) and runner.cache.rings
    assert runner.cache.nbytes > sum(ring.nbytes for ring in runner.cache.rings) > 0
    found = {runner.admit(prompt(length), count): [] for length, count in wishes}
    while runner.running or runner.waiting:
        for number, token in runner.step().items():
            found[number].append(token)
    expected = [alone(hybrid, prompt(length), count, policy="snapkv") for length, count in wishes]
    assert list(found.values()) == expected
    if replayed or DEVICE == "cuda":
        assert runner.cache.replays.mode == "graph"


def test_extents():
    extents = Extents(5, 25)
    assert [extents.take(owner, size) for owner, size in enumerate((6, 4, 8))] == [5, 11, 15]
    assert extents.gap(3) is None
    extents.release(0)
    extents.release(2)
    assert (extents.num_free, extents.gap(7), extents.gap(11)) == (16, 15, None)
    assert extents.pack() == [(1, 11, 5, 4)]
    assert extents.gap(16) == 9
    with pytest.raises(ValueError, match="no gap of 17 rows: 16 are free"):
        extents.take(3, 17)
