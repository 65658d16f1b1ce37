"""Policies and run-time allocators through a transformers model: what they are given, and what is freed when."""

import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import BudgetAllocator, EvictionPolicy, ModelSpec, PluginError
from kvpolicy.integrations.transformers.attention import sources
from kvpolicy.testing.laws import tensors_of
from tests.integrations.ragged_oracle import stepped_logits
from tests.tiny import attention_of, over, tiny_ids, tiny_model

GIVEN = []


@dataclass(frozen=True, slots=True)
class Watching(EvictionPolicy):
    """Keeps the most recent entries, and notes what it is given."""

    requires: ClassVar[frozenset[str]] = frozenset(
        {"positions", "queries", "hidden_before", "attention_input", "rope", "output_weight", "module"}
    )
    num_sink_tokens: int = 4

    def score_prompt(self, activations):
        GIVEN.append(activations)
        return activations.positions.float()


@dataclass(frozen=True, slots=True)
class KeyNorm(EvictionPolicy):
    """Keeps the entries with the smallest keys."""

    requires: ClassVar[frozenset[str]] = frozenset({"keys", "positions"})
    num_sink_tokens: int = 2

    def score_prompt(self, activations):
        return (-activations.keys.norm(dim=-1)).masked_fill(activations.positions < 0, float("-inf")).float()


@dataclass(frozen=True, slots=True)
class TopOfLayer(BudgetAllocator):
    """Each head gets as many entries as it has among the best half of its layer, or of all layers so far."""

    needs_importance: ClassVar[bool] = False
    split_scope: ClassVar[str] = "layer"

    def shares(self, importance, budget):
        return torch.ones(budget.shape)

    def split(self, scores, budget):
        layers = scores[-budget.shape[0] :]
        bound = torch.cat([x.flatten() for x in layers]).topk(budget.total).values[-1]
        return torch.stack([(x >= bound).sum(-1).double() for x in layers], 1)


@dataclass(frozen=True, slots=True)
class TopOfModel(TopOfLayer):
    split_scope: ClassVar[str] = "model"


@pytest.fixture(autouse=True)
def forget():
    GIVEN.clear()


@pytest.mark.parametrize("name", ["Llama", "Gemma3Window", "Cohere", "Olmo2"])
def test_a_policy_is_given_what_it_requires(name):
    model, ids = tiny_model(name), tiny_ids(20, batch=2)
    spec = ModelSpec.from_config(model.config)
    expected = stepped_logits(model, ids, DynamicCache(config=model.config), [12, 8])
    residuals = {}
    layers = model.model.layers
    hooks = [
        layers[index].register_forward_pre_hook(
            lambda _, args, given, index=index: residuals.update({index: args[0] if args else given["hidden_states"]}),
            with_kwargs=True,
        )
        for index in spec.budgeted_layers
    ]
    cache = kvpolicy.new_cache(model, retention=0.9, policy=Watching())
    torch.testing.assert_close(stepped_logits(model, ids, cache, [12, 8]), expected, rtol=0, atol=1e-5)
    for hook in hooks:
        hook.remove()
    assert [x.layer for x in GIVEN] == list(range(spec.num_budgeted_layers)) * 2
    for row, index in enumerate(spec.budgeted_layers):
        got = GIVEN[spec.num_budgeted_layers + row]
        attention = layers[index].self_attn
        assert got.module is attention and torch.equal(got.output_weight, attention.o_proj.weight)
        assert torch.equal(got.hidden_before, residuals[index]) and got.hidden_before.shape[1] == 8
        assert got.attention_input.shape == got.hidden_before.shape
        assert got.rope[0].shape[-2] == 8 and got.queries.shape[2] == 8
        assert got.positions.shape == (2, spec.num_kv_heads, 20)
    assert not sources._NOW.inputs, "nothing is kept alive behind a forward"


def test_a_source_that_a_model_cannot_supply_is_refused():
    @dataclass(frozen=True, slots=True)
    class Asking(EvictionPolicy):
        requires: ClassVar[frozenset[str]] = frozenset({"hidden_after"})
        num_sink_tokens: int = 4

        def score_prompt(self, activations):
            raise AssertionError("never called")

    model = tiny_model("Llama")
    with pytest.raises(PluginError, match="Asking requires hidden_after, which this cache cannot"):
        kvpolicy.new_cache(model, retention=0.5, policy=Asking())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["Llama", "Gemma2Window", "Gemma3n"])
def test_keys_and_values_are_freed_layer_by_layer(name, monkeypatch):
    """At most one full layer stays alive; one that later layers read, until the last of them has."""
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(200)
    spec = ModelSpec.from_config(model.config)
    cache = kvpolicy.new_cache(model, retention=0.1, min_tokens=8)
    alive, most = {}, []
    update = type(cache).update

    def watched(self, key, value, layer_idx, *rest, **options):
        most.append([index for index, refs in alive.items() if any(ref() is not None for ref in refs)])
        if spec.layers[layer_idx].is_budgeted:
            alive[layer_idx] = [weakref.ref(key), weakref.ref(value)]
        return update(self, key, value, layer_idx, *rest, **options)

    monkeypatch.setattr(type(cache), "update", watched)
    with torch.no_grad():
        model(ids, **over(cache))
    shared = {layer.shared_with for layer in spec.layers}
    assert all(set(indices) <= shared for indices in most), most
    assert len(alive) == spec.num_budgeted_layers
    assert all(ref() is None for refs in alive.values() for ref in refs)
    assert int(cache.lengths.max()) < 60


@pytest.mark.parametrize("allocator", [TopOfLayer(), TopOfModel()], ids=["layer", "model"])
def test_two_prompts_times_three_beams_under_a_run_time_allocator(allocator):
    model = tiny_model("Llama")
    spec = ModelSpec.from_config(model.config)
    short, long = tiny_ids(18), tiny_ids(40)
    ids = torch.cat([torch.nn.functional.pad(short, (22, 0)), long])
    mask = (torch.arange(40)[None] >= torch.tensor([22, 0])[:, None]).long()
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}

    def run(rows, row_mask):
        cache = kvpolicy.new_cache(model, policy=KeyNorm(), allocator=allocator, retention=0.4, min_tokens=6)
        return model.generate(rows, attention_mask=row_mask, **over(cache), **options)[:, -12:], cache

    both, cache = run(ids, mask)
    for row, prompt in enumerate((short, long)):
        alone, own = run(prompt, torch.ones_like(prompt))
        assert torch.equal(both[row], alone[0])
        assert torch.equal(cache.capacities[:, 3 * row : 3 * row + 3], own.capacities)
        total = max(round(0.4 * prompt.shape[1] * 6), 6 * 6)
        assert int(own.capacities[:, 0].sum()) == total
    assert len(set(own.capacities[:, 0].flatten().tolist())) > 1, "the heads differ"
    assert spec.table_shape == (3, 2)


def test_protected_spans_outlast_everything():
    model, ids = tiny_model("Llama"), tiny_ids(90)
    cache = kvpolicy.new_cache(model, retention=0.1, min_tokens=8, protected=[(10, 25), (60, 63)])
    stepped_logits(model, ids, cache, [40, *[1] * 50])
    span = {*range(10, 25), *range(60, 63)}
    for layer in range(3):
        for kept in cache.store.positions(layer):
            assert span | {0, 1, 2, 3} <= set(kept.tolist())
            assert len(kept) == len(span) + 9 or len(kept) == len(span) + 8
    assert bool((cache.lengths <= cache.capacities).all())


@dataclass(frozen=True, slots=True)
class Destroying(EvictionPolicy):
    """Keeps the most recent; zeroes whatever it was given, if it is told to."""

    requires: ClassVar[frozenset[str]] = frozenset(
        {
            "positions",
            "keys",
            "values",
            "queries",
            "hidden_before",
            "attention_input",
            "rope",
            "rotary",
            "output_weight",
        }
    )
    num_sink_tokens: int = 1
    destroys: bool = True

    def score_prompt(self, activations):
        scores = activations.positions.float()
        for _, tensor in tensors_of(activations):
            if self.destroys:
                tensor.zero_()
        return scores


def test_a_policy_that_writes_into_what_it_was_given_changes_neither_text_nor_model():
    model, ids = tiny_model("Llama", layers=2), tiny_ids(40)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for destroys in (False, True):
        cache = kvpolicy.new_cache(model, policy=Destroying(destroys=destroys), retention=0.5, min_tokens=8)
        with torch.no_grad():
            found.append(torch.cat([model(each, **over(cache)).logits for each in (ids, ids[:, :1])], 1))
        assert int(cache.store.lengths.max()) < 40
    assert torch.equal(*found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_estimator_that_writes_into_weights_and_rotation_changes_no_model():
    model, ids = tiny_model("Llama", layers=2), tiny_ids(24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe, seen = kvpolicy.TransformersProbe(model, ids, [ids[0]]), []

    def write(activations):
        seen.append(activations.rope[0].clone())
        for _, tensor in tensors_of(activations):
            tensor.zero_()

    for _ in range(2):
        probe.observe(write, frozenset({"rope", "rotary", "output_weight", "keys"}))
    assert all(torch.equal(seen[0], rope) for rope in seen[1:])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
