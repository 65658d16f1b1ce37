import pytest
import torch
from kvpolicy_baklava.allocator import BaklavaAllocator
from kvpolicy_baklava.estimator import CosineEstimator
from kvpolicy_baselines.streaming import StreamingPolicy
from kvpolicy_baselines.uniform import UniformAllocator, UniformEstimator

from kvpolicy import Budget, Importance, PluginError, TransformersProbe
from kvpolicy.testing import check_allocator, check_estimator, check_eviction_policy
from tests.tiny import tiny_model

CASES = [("Llama", 1), ("Llama", 4), ("Qwen2", 3), ("Qwen2", 4), ("Gemma3", 3), ("Gemma3", 4), ("Phi3", 1), ("Phi3", 3)]


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def keep(store, index, pick):
    return lambda module, args, result: store.__setitem__(index, pick(result))


def direct_importance(model, prompts, group_rule):
    """From the model's own attention weights and value projections, one token, one head at a time."""
    config = model.config
    num_q, num_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    blocks = model.model.layers
    per_head = torch.zeros(len(blocks), num_kv)
    per_layer = torch.zeros(len(blocks))
    for prompt in prompts:
        values, attended = {}, {}
        handles = []
        for i, block in enumerate(blocks):
            projection = getattr(block.self_attn, "v_proj", None) or block.self_attn.qkv_proj
            handles.append(projection.register_forward_hook(keep(values, i, lambda r: r[0])))
            handles.append(block.self_attn.register_forward_hook(keep(attended, i, lambda r: r[0][0])))
        with torch.no_grad():
            out = model(prompt[None], output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        for i, block in enumerate(blocks):
            value = values[i][:, -num_kv * dim :].reshape(len(prompt), num_kv, dim)
            weights = out.attentions[i][0]
            scores = torch.zeros(num_q)
            for h in range(num_q):
                kv = h // (num_q // num_kv)
                result = weights[h] @ value[:, kv]
                scores[h] = 1 - torch.stack([cosine(value[t, kv], result[t]) for t in range(1, len(prompt))]).mean()
            grouped = scores.reshape(num_kv, -1)
            per_head[i] += (grouped.mean(1) if group_rule == "mean" else grouped.max(1).values) / len(prompts)
            before = out.hidden_states[i][0]
            change = attended[i]
            if hasattr(block, "pre_feedforward_layernorm"):
                change = block.post_attention_layernorm(change)
            per_layer[i] += (1 - cosine(before[1:], (before + change)[1:]).mean()) / len(prompts)
    return per_head.clamp(min=0), per_layer.clamp(min=0)


@pytest.mark.parametrize("rule", ["mean", "max"])
@pytest.mark.parametrize(("name", "group"), CASES)
def test_cosine_equals_a_direct_computation(name, group, rule):
    model = tiny_model(name, group=group, attention="eager")
    prompts = [torch.randint(3, 97, (n,)) for n in (11, 30)]
    per_head, per_layer = direct_importance(model, prompts, rule)
    model.set_attn_implementation("sdpa")
    probe = TransformersProbe(model, torch.randint(3, 97, (1, 64)), prompts)
    measured = CosineEstimator(group=rule).estimate(probe)
    torch.testing.assert_close(measured.per_head, per_head, rtol=0, atol=2e-5)
    torch.testing.assert_close(measured.per_layer, per_layer, rtol=0, atol=2e-5)


@pytest.mark.parametrize("head_input", ["proj", "proj_residual", "slice"])
def test_variants_equal_their_formula(head_input):
    model = tiny_model("Llama", group=3, num_kv_heads=1)  # 3 heads x 16 = hidden size 48
    prompt = torch.randint(3, 97, (12,))
    probe = TransformersProbe(model, torch.randint(3, 97, (1, 64)), [prompt])
    kept = {}
    sources = frozenset({"output", "hidden_before", "attention_input"})
    probe.observe(lambda a: kept.__setitem__(a.layer, a), sources)
    expected = torch.zeros(3, 1)
    for layer, a in kept.items():
        weight = model.model.layers[layer].self_attn.o_proj.weight
        for h in range(3):
            out = a.output[0, h]
            if head_input == "slice":
                pair = a.attention_input[0, :, h * 16 : (h + 1) * 16], out
            else:
                projected = out @ weight[:, h * 16 : (h + 1) * 16].T
                pair = a.hidden_before[0], projected + (a.hidden_before[0] if head_input == "proj_residual" else 0)
            expected[layer, 0] += (1 - cosine(pair[0][1:], pair[1][1:]).mean()) / 3
    measured = CosineEstimator(head_input=head_input).estimate(probe).per_head
    torch.testing.assert_close(measured, expected.detach().clamp(min=0), rtol=0, atol=2e-5)


def test_slice_refuses_a_model_where_it_does_not_exist():
    model = tiny_model("Gemma3", group=3, num_kv_heads=2)  # 6 heads x 16 != 48
    probe = TransformersProbe(model, torch.randint(3, 97, (1, 64)), [torch.randint(3, 97, (12,))])
    with pytest.raises(PluginError, match="'slice' needs hidden_size"):
        CosineEstimator(head_input="slice").estimate(probe)


IMPORTANCE = Importance(per_head=torch.tensor([[0.1, 0.3], [0.2, 0.2]]), per_layer=torch.tensor([0.4, 0.1]))
BUDGET = Budget(total=400, shape=(2, 2), floor=5, ceiling=400)


def test_power_shares_by_hand():
    shares = BaklavaAllocator(layer_exponent=1, head_exponent=2, floor_share=0).shares(IMPORTANCE, BUDGET)
    weight = torch.tensor([[0.01 * 0.4, 0.09 * 0.4], [0.04 * 0.1, 0.04 * 0.1]], dtype=torch.float64)
    torch.testing.assert_close(shares / shares.sum(), weight / weight.sum(), rtol=1e-6, atol=0)


def test_the_floor_is_a_share_of_uniform():
    shares = BaklavaAllocator(head_exponent=8, floor_share=0.5).shares(IMPORTANCE, BUDGET)
    # 0.3^8 outweighs the others by far: they get the floor, and it the rest
    expected = torch.tensor([[0.5, 2.5], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(shares, expected)


def test_zero_exponents_are_uniform():
    shares = BaklavaAllocator(layer_exponent=0, head_exponent=0).shares(IMPORTANCE, BUDGET)
    torch.testing.assert_close(shares, torch.ones_like(shares))


def test_two_levels_by_hand():
    allocator = BaklavaAllocator(shape="two_level", layer_exponent=0, floor_share=0, top_fraction=0.25, top_share=0.7)
    shares = allocator.shares(IMPORTANCE, BUDGET)
    expected = torch.tensor([[0.1, 0.7], [0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(shares / shares.sum(), expected)


@pytest.mark.parametrize("bad", [{"floor_share": 2}, {"shape": "cube"}, {"top_share": 1.0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(PluginError, match="baklava:"):
        BaklavaAllocator(**bad)
    with pytest.raises(PluginError, match="cosine:"):
        CosineEstimator(head_input="key")


@pytest.mark.parametrize("head_input", ["value", "proj", "proj_residual"])
def test_estimators_conform(head_input):
    check_estimator(CosineEstimator(head_input=head_input))
    check_estimator(UniformEstimator())


def test_allocators_conform():
    check_allocator(BaklavaAllocator)
    check_allocator(BaklavaAllocator(shape="two_level"))
    check_allocator(UniformAllocator)


def test_policies_conform():
    check_eviction_policy(StreamingPolicy)
