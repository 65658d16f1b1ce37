import dataclasses

import pytest
import torch
import torch.nn.functional as F
from kvpolicy_kernels.window_attention.reference import window_mask

from kvpolicy import BudgetError, ModelError, ModelSpec, PluginError, TransformersProbe, registry
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.integrations.transformers.attention.observe import SUPPLIED, LayerObserver
from kvpolicy.integrations.transformers.attention.rotary import find_rotary
from tests.tiny import attention_of, tiny_ids, tiny_model

ARCHITECTURES = ["Llama", "Qwen2", "Phi3", "Gemma3", "Granite", "Olmo2", "Cohere"]
HANDLED_IN_EAGER = ["Gemma2", "GptOss"]
SHARED_KEYS = ["Gemma3n"]  # its hidden states have an axis more, so that there is no residual stream to observe


@pytest.mark.parametrize("name", ARCHITECTURES + HANDLED_IN_EAGER)
def test_logits_are_bit_identical_under_the_probe(name):
    model = tiny_model(name, attention=attention_of(name))
    spec, x = ModelSpec.from_config(model.config), tiny_ids(40)
    plain = model(x).logits
    seen, pairs = [], attention_modules(model, spec.budgeted_layers)
    find_rotary(model, [attention for attention, _ in pairs])
    observers = [
        LayerObserver(i, spec, attention, block, SUPPLIED, lambda a: seen.append(a.layer))
        for i, (attention, block) in enumerate(pairs)
    ]
    with intercepted(model, {o.attention: o for o in observers}):
        for observer in observers:
            observer.hook = observer.hooked()
            observer.hook.__enter__()
        probed = model(x).logits
        for observer in observers:
            observer.hook.__exit__(None, None, None)
    assert torch.equal(plain, probed)
    assert seen == list(range(spec.num_budgeted_layers))
    assert torch.equal(plain, model(x).logits), "the model is as it was after the probe"


def residual_after_attention(name, block, before, attended):
    """What the modeling file of each architecture computes."""
    if name in ("Gemma2", "Gemma3", "Olmo2"):
        return before + block.post_attention_layernorm(attended)
    if name == "Granite":
        return before + attended * block.residual_multiplier
    return before + attended


@pytest.mark.parametrize("name", ARCHITECTURES + HANDLED_IN_EAGER)
def test_hidden_states_around_attention(name):
    model = tiny_model(name, attention=attention_of(name))
    probe = TransformersProbe(model, tiny_ids(64), [tiny_ids(30)[0]])
    attended, given = {}, {}
    for index, (attention, block) in enumerate(probe._modules):
        attention.register_forward_hook(lambda m, a, r, index=index: attended.__setitem__(index, r[0]))
        block.register_forward_pre_hook(lambda m, a, index=index: given.__setitem__(index, a[0]))
    after = {}
    probe.observe(lambda a: after.__setitem__(a.layer, a.hidden_after), frozenset({"hidden_after"}))
    for index, (_, block) in enumerate(probe._modules):
        expected = residual_after_attention(name, block, given[index], attended[index])
        torch.testing.assert_close(after[index], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["decode_attention", "scores", "repeat_attention", "query_attention"])
def test_observe_refuses_by_name_before_any_work(source):
    probe = TransformersProbe(tiny_model("Llama"), tiny_ids(64), [tiny_ids(30)[0]])
    with pytest.raises(PluginError, match=f"cannot supply {source};"):
        probe.observe(lambda a: pytest.fail("ran"), frozenset({"keys", source}))


@pytest.mark.parametrize("window", [1, 7, 100])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Granite", "Phi3", *HANDLED_IN_EAGER])
def test_attention_is_what_the_model_itself_computes(name, window):
    """Softcaps, learned sinks and other scales included; summed over the last queries and over the query group."""
    model = tiny_model(name, attention="eager")
    prompt = tiny_ids(30)[0]
    with torch.no_grad():
        attentions = model(prompt[None], output_attentions=True).attentions
    model.set_attn_implementation(attention_of(name))
    probe, seen = TransformersProbe(model, tiny_ids(64), [prompt]), []
    probe.observe(seen.append, frozenset({"window_attention", "full_attention"}), observation_window=window)
    assert [a.layer for a in seen] == list(range(probe.spec.num_budgeted_layers))
    for given, model_layer in zip(seen, probe.spec.budgeted_layers, strict=True):
        by_group = attentions[model_layer].unflatten(1, (probe.spec.num_kv_heads, -1)).sum(2)  # [1, H, n, n]
        torch.testing.assert_close(given.full_attention, by_group.sum(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(given.window_attention, by_group[:, :, -window:].sum(2), rtol=0, atol=1e-5)


def test_an_estimator_runs_prompts_of_its_own():
    model = tiny_model("Llama")
    own = [tiny_ids(9)[0], tiny_ids(14)[0]]
    probe, seen = TransformersProbe(model, tiny_ids(64), [tiny_ids(30)[0]]), []

    def visit(activations):
        seen.append((activations.layer, activations.hidden_before[0, :, 0]))

    probe.observe(visit, frozenset({"hidden_before"}), prompts=own)
    assert [(layer, len(hidden)) for layer, hidden in seen] == [(i, n) for n in (9, 14) for i in range(3)]
    for (_, hidden), prompt in zip(seen[::3], own, strict=True):
        torch.testing.assert_close(hidden, model.model.embed_tokens(prompt)[:, 0], rtol=0, atol=0)
    assert [prompt.tolist() for prompt in probe.prompts] == [tiny_ids(30)[0].tolist()]
    probe.observe(lambda a: pytest.fail("ran"), frozenset({"keys"}), prompts=[])
    with pytest.raises(PluginError, match="observation_window must be at least 1, got 0"):
        probe.observe(lambda a: pytest.fail("ran"), frozenset({"keys"}), observation_window=0)


def test_tokens_of_a_text_need_a_tokenizer():
    probe = TransformersProbe(tiny_model("Llama"), tiny_ids(64), tokenize=lambda text: [len(w) for w in text.split()])
    ids = probe.tokenize("one three")
    assert ids.tolist() == [3, 5] and ids.dtype == torch.int64
    with pytest.raises(PluginError, match="no tokenizer, and was asked for the tokens of 'one three'"):
        TransformersProbe(tiny_model("Llama"), tiny_ids(64)).tokenize("one three")


def plain_loss(model, x, first):
    losses = F.cross_entropy(model(x).logits[0, first - 1 : -1], x[0, first:], reduction="none")
    return float(losses.double().mean())


@pytest.mark.parametrize("name", ARCHITECTURES + HANDLED_IN_EAGER + SHARED_KEYS)
def test_full_capacities_equal_the_model(name):
    model = tiny_model(name, attention=attention_of(name))
    x = tiny_ids(80)
    probe = TransformersProbe(model, x)
    with torch.no_grad():
        expected = plain_loss(model, x, 20)
    assert float(probe.full_loss()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prefill", [0, 33])
@pytest.mark.parametrize("name", ARCHITECTURES + HANDLED_IN_EAGER + SHARED_KEYS)
def test_loss_equals_the_models_own_attention_under_the_mask(name, prefill):
    """The oracle is the architecture's eager attention with a dense per-head mask."""
    model = tiny_model(name, attention="eager")
    spec = ModelSpec.from_config(model.config)
    x = tiny_ids(200)
    generator = torch.Generator().manual_seed(3)
    capacities = torch.randint(5, 120, spec.table_shape, generator=generator)
    probe = TransformersProbe(model, x, prefill_length=prefill)
    loss = float(probe.loss(capacities))

    class Masked:
        def __init__(self, row):
            mask = window_mask(row.tolist(), 4, x.shape[1], prefill).repeat_interleave(spec.group_size, 0)
            self.bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None]

        def __call__(self, call):
            return dataclasses.replace(call, base="eager", mask=self.bias).stock()

    assert len(probe._windowed) == sum(x.kind == "full" for x in spec.layers), "also the layers that share keys"
    with torch.no_grad(), intercepted(model, {m: Masked(capacities[row]) for m, row in probe._windowed}):
        expected = plain_loss(model, x, max(50, prefill))
    assert loss == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        dense = plain_loss(model, x, max(50, prefill))
    assert abs(loss - dense) > 1e-4 * dense, "the mask must have had an effect"


class DecodeThroughStore:
    """A layer's attention, one token at a time through a ragged store."""

    def __init__(self, store, layer):
        self.store, self.layer = store, layer

    def __call__(self, call):
        feed = self.store.decode if self.store.can_append(self.layer) else self.store.prefill
        out = feed(self.layer, call.query, call.key, call.value, scale=call.options["scaling"])
        return out.transpose(1, 2), None


def decoded_loss(model, spec, x, capacities, first):
    """Token by token, no mask, no transformers cache: only what the store holds is seen."""
    policy = registry.create("policy", "streaming", {"num_sink_tokens": 4})
    store = RaggedStore(spec, Fixed(capacities), policy)
    modules = [attention for attention, _ in attention_modules(model, spec.budgeted_layers)]
    losses = []
    with torch.no_grad(), intercepted(model, {m: DecodeThroughStore(store, i) for i, m in enumerate(modules)}):
        for t in range(x.shape[1] - 1):
            logits = model(x[:, t : t + 1], position_ids=torch.tensor([[t]]), use_cache=False).logits
            assert bool((store.lengths[:, 0] <= capacities).all())
            if t + 1 >= first:
                losses.append(F.cross_entropy(logits[:, 0], x[:, t + 1]))
    return float(torch.stack(losses).double().mean())


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma3"])
def test_loss_equals_token_by_token_decoding(name):
    model = tiny_model(name)
    spec = ModelSpec.from_config(model.config)
    x = tiny_ids(150)
    capacities = torch.randint(5, 100, spec.table_shape, generator=torch.Generator().manual_seed(5))
    loss = float(TransformersProbe(model, x).loss(capacities))
    assert loss == pytest.approx(decoded_loss(model, spec, x, capacities, 37), rel=1e-5)


@pytest.mark.slow
def test_loss_equals_token_by_token_decoding_on_smollm2(smollm2):
    model, tokenizer = smollm2
    spec = ModelSpec.from_config(model.config)
    text = "The store keeps a few entries of each head. " * 40 + "What it forgets, the model cannot see."
    x = torch.tensor([tokenizer(text).input_ids[:320]])
    capacities = torch.randint(5, 200, spec.table_shape, generator=torch.Generator().manual_seed(7))
    loss = float(TransformersProbe(model, x).loss(capacities))
    assert loss == pytest.approx(decoded_loss(model, spec, x, capacities, 80), rel=1e-4)


def test_a_batch_gives_what_its_rows_give():
    model = tiny_model("Llama")
    x = tiny_ids(100, batch=3)
    capacities = torch.tensor([[9, 40], [70, 8], [20, 20]])
    alone = torch.cat([TransformersProbe(model, row[None]).loss(capacities) for row in x])
    torch.testing.assert_close(TransformersProbe(model, x, batch_size=2).loss(capacities), alone, rtol=1e-6, atol=0)


def test_capacities_of_another_shape_are_refused():
    probe = TransformersProbe(tiny_model("Llama"), tiny_ids(64))
    with pytest.raises(BudgetError, match=r"shape \(2, 2\), this model has .* \(3, 2\)"):
        probe.loss(torch.full((2, 2), 9))
    with pytest.raises(BudgetError, match="more than the 4 sink tokens, got a capacity of 4"):
        probe.loss(torch.full((3, 2), 4))


def test_a_model_without_the_attention_interface_is_refused():
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=97)
    with pytest.raises(ModelError, match="Falcon"):
        TransformersProbe(FalconForCausalLM(config).eval(), tiny_ids(64))


def test_an_error_inside_leaves_the_model_as_it_was():
    model = tiny_model("Llama")
    spec, x = ModelSpec.from_config(model.config), tiny_ids(20)
    plain = model(x).logits

    def broken(_):
        raise RuntimeError("broken")

    module = attention_modules(model, spec.budgeted_layers)[1][0]
    with pytest.raises(RuntimeError, match="broken"), intercepted(model, {module: broken}):
        model(x)
    assert torch.equal(plain, model(x).logits)
    assert model.config._attn_implementation == "sdpa"
