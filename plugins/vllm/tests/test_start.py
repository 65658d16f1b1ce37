"""What is refused at start, what is told, and that vLLM is left alone without the key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import CAPACITIES, MAX_MODEL_LEN, prompts, save_plan
from kvpolicy_vllm import hooks, report
from kvpolicy_vllm.serving import Serving
from kvpolicy_vllm.settings import Settings

import kvpolicy

FIXED = {"tokens": 50, "context_length": MAX_MODEL_LEN}


def config(model: str, settings: dict[str, Any], **options: Any) -> Any:
    """What an engine would be made of, before any weight is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    common = {"max_model_len": MAX_MODEL_LEN, "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    return EngineArgs(
        model=model, additional_config={"kvpolicy": settings}, **{**common, **options}
    ).create_engine_config()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin logs. A handler would not do: vLLM takes it away when it sets its logging up."""
    told: list[str] = []
    monkeypatch.setattr(report.logger, "info", lambda message, *args: told.append(message % args))
    return told


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "additional_config.kvpolicy is 7, expected an object"),
        ({}, "kvpolicy.plan is missing"),
        ({"plan": 3, "tokens": 5}, "kvpolicy.plan is 3"),
        ({"plan": "p", "token": 5}, "kvpolicy.token is unknown; the fields are plan, tokens, retention"),
        ({"plan": "p", "tokens": 0}, "kvpolicy.tokens is 0"),
        ({"plan": "p", "tokens": True}, "kvpolicy.tokens is True"),
        ({"plan": "p", "tokens": 5, "context_length": 2.5}, "kvpolicy.context_length is 2.5"),
        ({"plan": "p", "retention": "0.2"}, "kvpolicy.retention is '0.2'"),
        ({"plan": "p", "retention": 1.5}, "kvpolicy.retention is 1.5"),
        ({"plan": "p"}, "expected one of tokens and retention"),
        ({"plan": "p", "tokens": 5, "retention": 0.2}, "expected one of tokens and retention"),
    ],
)
def test_settings_name_the_field(value: Any, message: str) -> None:
    with pytest.raises(kvpolicy.BudgetError, match=message) as caught:
        Settings.read({"kvpolicy": value})
    assert "\n" not in str(caught.value)


def test_without_the_key_there_is_nothing_to_do() -> None:
    assert Settings.read({}) is Settings.read(None) is Settings.read({"other": 1}) is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"enable_prefix_caching": True}, "prefix caching"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        ({"kv_cache_dtype": "fp8"}, "a cache quantised to fp8"),
    ],
)
def test_what_cannot_hold_is_refused_by_name(model: str, plan: str, options: dict[str, Any], name: str) -> None:
    with pytest.raises(kvpolicy.BudgetError, match=f"cannot serve this: .*{name}") as caught:
        config(model, {"plan": plan, **FIXED}, **options)
    assert "\n" not in str(caught.value)


def test_refusals_read_the_parallel_configuration(model: str, plan: str) -> None:
    made = config(model, {"plan": plan, **FIXED})
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        setattr(made.parallel_config, name, 2)
        with pytest.raises(kvpolicy.BudgetError, match=r"no DCP, no PCP"):
            hooks.refusals.check(made)
        setattr(made.parallel_config, name, 1)
    made.parallel_config.tensor_parallel_size = 4
    with pytest.raises(kvpolicy.BudgetError, match="4 tensor-parallel ranks do not divide the model's 2 KV heads"):
        hooks.refusals.check(made)


def test_models_are_refused_by_name(model: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config(model, {"plan": plan, **FIXED})
    monkeypatch.setattr(type(loaded.model_config), "is_multimodal_model", True)
    with pytest.raises(kvpolicy.BudgetError, match="cannot serve this: multi-modal prompts attend to prefixes"):
        hooks.refusals.check(loaded)
    made = SimpleNamespace(architectures=["GPTNeoXForCausalLM"], get_sliding_window=lambda: 128)
    reasons = list(hooks.refusals._model_reasons(made))
    assert reasons[0].startswith("the architecture GPTNeoXForCausalLM; known are LlamaForCausalLM, ")
    assert reasons[1] == "sliding windows, but for those of Gemma3ForCausalLM"


def test_vllm_wants_pages_of_one_size_beside_sliding_windows() -> None:
    """Why blocks are padded beside them: up to 0.27 vLLM raises, and 0.32 pads each page to the largest."""
    from kvpolicy_vllm.cache_spec import spec_of
    from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    window = SlidingWindowSpec(block_size=16, num_kv_heads=2, sliding_window=64, head_size=32, dtype=torch.bfloat16)
    layers = {
        str(rows): spec_of(
            SimpleNamespace(
                impl=SimpleNamespace(rows=rows, serving=SimpleNamespace(tokens_per_block=64)),
                head_size=32,
                head_size_v=32,
                kv_cache_torch_dtype=torch.bfloat16,
            )
        )
        for rows in (26, 40)
    }
    try:
        unified = unify_kv_cache_spec_page_size({"window": window, **layers})
    except NotImplementedError as error:
        assert "page size is not divisible by the maximum page size" in str(error)
    else:
        assert {spec.page_size_bytes for spec in unified.values()} == {layers["40"].page_size_bytes}
        assert unified["window"].block_size == 16


def test_plans_that_do_not_fit_are_refused_by_name(model: str, plan: str, tmp_path: Path) -> None:
    with pytest.raises(kvpolicy.PlanError, match="nowhere"):
        config(model, {"plan": str(tmp_path / "nowhere.json"), **FIXED})
    broken = tmp_path / "broken.json"
    broken.write_text("{}", encoding="utf-8")
    with pytest.raises(kvpolicy.PlanError, match="format"):
        config(model, {"plan": str(broken), **FIXED})
    with pytest.raises(kvpolicy.PlanError, match="below the plan's lowest level"):
        config(model, {"plan": plan, "retention": 0.01, "context_length": MAX_MODEL_LEN})
    with pytest.raises(kvpolicy.BudgetError, match=r"kvpolicy.tokens is 600, more than the 512 tokens"):
        config(model, {"plan": plan, "tokens": 600})
    other = save_plan(model, tmp_path / "other.json", [[64, 64]] * 3, policy="h2o")
    with pytest.raises(kvpolicy.PluginError, match="'h2o' scores entries by more than their keys and the attention of"):
        config(model, {"plan": other, **FIXED})
    keys = save_plan(model, tmp_path / "keys.json", [[64, 200]] * 3, policy="keydiff")
    with pytest.raises(kvpolicy.BudgetError, match="'keydiff' needs fixed capacities"):
        config(model, {"plan": keys, "retention": 264 / 1024})
    few = save_plan(model, tmp_path / "few.json", [[60, 200]] * 3, policy="keydiff")
    with pytest.raises(kvpolicy.BudgetError, match="would have 60 entries, too few for the plan's policy 'keydiff'"):
        config(model, {"plan": few, "retention": 260 / 1024, "context_length": MAX_MODEL_LEN})
    asked = save_plan(model, tmp_path / "asked.json", [[100, 200]] * 3, policy="snapkv")
    with pytest.raises(kvpolicy.BudgetError, match=r"cut every 16 tokens, too few for .* 'snapkv' to ask 32 queries"):
        config(model, {"plan": asked, "retention": 300 / 1024, "context_length": MAX_MODEL_LEN})
    lopsided = save_plan(model, tmp_path / "lopsided.json", [[6, 400]] * 3)
    with pytest.raises(kvpolicy.BudgetError, match="no block of up to 256 tokens holds the plan's smallest shares"):
        config(model, {"plan": lopsided, "retention": 406 / 1024}, max_model_len=256)


def test_plan_of_another_model_is_refused(model: str, plan: str, tmp_path: Path) -> None:
    text = Path(plan).read_text(encoding="utf-8").replace('"num_q_heads": 4', '"num_q_heads": 8')
    (tmp_path / "theirs.json").write_text(text, encoding="utf-8")
    with pytest.raises(kvpolicy.PlanError, match="num_q_heads is 8 in the plan, 4 in the model"):
        config(model, {"plan": str(tmp_path / "theirs.json"), **FIXED})


def test_another_vllm_is_refused(model: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks.vllm, "__version__", "0.99.0")
    with pytest.raises(kvpolicy.BudgetError, match=r"made for vLLM .*, not 0\.99\.0"):
        config(model, {"plan": plan, **FIXED})


def test_ranks_get_blocks_of_one_size(model: str, tmp_path: Path) -> None:
    plan = save_plan(model, tmp_path / "plan.json", CAPACITIES)
    serving = Serving.of(config(model, {"plan": plan, **FIXED}))
    assert serving is not None and serving.is_slab
    for layer, row in enumerate(serving.slots):
        halves = [serving.rank_slots(layer, rank, 2) for rank in range(2)]
        assert sum(halves, ()) == row
        assert serving.rows(layer, 2) == max(row) and serving.rows(layer, 1) == sum(row)


def test_blocks_are_the_smallest_that_keep_the_shares(model: str, tmp_path: Path) -> None:
    plan = save_plan(model, tmp_path / "plan.json", [[48, 304]] * 3)
    serving = Serving.of(config(model, {"plan": plan, "retention": 352 / 1024}))
    assert serving is not None and serving.tokens_per_block == 64 and serving.slots == ((6, 38),) * 3
    small = save_plan(model, tmp_path / "small.json", [[13, 300]] * 3)
    serving = Serving.of(config(model, {"plan": small, "retention": 313 / 1024}))
    assert serving is not None and serving.tokens_per_block == 256
    hf_config = transformers.AutoConfig.from_pretrained(model)
    long = Serving.resolve(Settings(plan, retention=352 / 1024), hf_config, 4096, 1, 16)
    assert long.tokens_per_block == 128  # no more than 32 of them


def test_formats_and_shared_layers_of_a_plan_are_refused(model: str, tmp_path: Path) -> None:
    plan = kvpolicy.load_plan(save_plan(model, tmp_path / "plan.json", CAPACITIES))
    hf_config = transformers.AutoConfig.from_pretrained(model)
    kvpolicy.save_plan(plan.sharing(kvpolicy.ModelSpec.from_config(hf_config), {1: 0}), tmp_path / "shared.json")
    with pytest.raises(kvpolicy.PlanError, match=r"layers \[1\] keep no entries \(shared_layers\)"):
        Serving.resolve(Settings(str(tmp_path / "shared.json"), tokens=50), hf_config, MAX_MODEL_LEN, 1, 16)
    levels = tuple(replace(level, formats=("int4", "int8", "model")) for level in plan.levels)
    kvpolicy.save_plan(replace(plan, levels=levels), tmp_path / "coded.json")
    with pytest.raises(kvpolicy.BudgetError, match=r"coded\.json keeps entries in formats of fewer bits"):
        Serving.resolve(Settings(str(tmp_path / "coded.json"), tokens=50), hf_config, MAX_MODEL_LEN, 1, 16)


def test_start_tells_what_it_saves_and_vllm_agrees(model: str, plan: str, engine: Any, lines: list[str]) -> None:
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    settings = {"plan": plan, "retention": sum(map(sum, CAPACITIES)) / 3072, "context_length": MAX_MODEL_LEN}
    ratios = []
    for given in (settings, None):
        core = engine(given, num_gpu_blocks_override=None).llm_engine.engine_core.engine_core
        cache = core.scheduler.kv_cache_config
        sizes = [tensor.size for tensor in cache.kv_cache_tensors]
        is_shared = hasattr(cache.kv_cache_tensors[0], "layers")  # from 0.32 on: parts of one allocation, its size
        memory = sizes[0] if is_shared else sum(sizes)
        ratios.append(get_max_concurrency_for_kv_cache_config(core.vllm_config, cache) / memory)
    dense = 3 * 2 * MAX_MODEL_LEN
    kept = sum(map(sum, CAPACITIES))
    assert ratios[0] / ratios[1] == pytest.approx(dense / kept, rel=1e-6)
    assert len(lines) == 2
    assert "gives each KV head 12 to 128 entries (mean 47.3) in a slab, after 4 sink tokens" in lines[0]
    assert f"{kept * 256 / 512:.1f} bytes a token at 512 tokens, dense 1536.0" in lines[1]
    assert f"{dense / kept:.2f} times the concurrency" in lines[1]


def test_without_the_key_vllm_keeps_its_own_attention(model: str, engine: Any, lines: list[str]) -> None:
    config_of = engine().llm_engine.vllm_config
    layers = config_of.compilation_config.static_forward_context.values()
    assert {layer.attn_backend.get_name() for layer in layers} == {"CPU_ATTN"}
    assert lines == []


def test_served_tokens_are_told_once_in_a_while(
    model: str, plan: str, engine: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpolicy_vllm import backend
    from vllm import SamplingParams

    monkeypatch.setattr(report, "INTERVAL", 0.0)
    llm = engine({"plan": plan, **FIXED})
    monkeypatch.setattr(backend, "pulse", report.Pulse())
    del lines[:]
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p} for p in prompts([20])], sampling, use_tqdm=False)
    slots = [n for row in Serving.of(llm.llm_engine.vllm_config).slots for n in row]
    told = (
        "kvpolicy: attended under the plan's budgets since the last such line: tokens {}, steps 1; requests in the "
        "last step: 1, of {} tokens with {:.1f} bytes each, dense 1536; entries per KV head {:.1f}, dense {}.0"
    )
    expected = []
    for tokens, seen in ((20, 20), (1, 21), (1, 22)):
        entries = sum(min(n, seen) for n in slots)
        expected.append(told.format(tokens, seen, entries * 256 / seen, entries / 6, seen))
    assert lines == expected
    assert min(slots) < 20


def test_figures_are_among_the_metrics(model: str, plan: str) -> None:
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    for settings, kept in ((FIXED, 300), ({"tokens": 100, "context_length": MAX_MODEL_LEN}, 600)):
        config(model, {"plan": plan, **settings})
        unregister_vllm_metrics()  # as vLLM does when its own metrics begin
        found = {
            (sample.name, sample.labels.get("statistic")): sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name.startswith("vllm:kvpolicy_") and sample.labels["model_name"] == model
        }
        names = [metric.name for metric in REGISTRY.collect() if metric.name.startswith("vllm:kvpolicy_")]
        assert len(names) == len(set(names)) == 4
        assert found["vllm:kvpolicy_bytes_per_token", None] == kept * 256 / MAX_MODEL_LEN
        assert found["vllm:kvpolicy_dense_bytes_per_token", None] == 1536
        assert found["vllm:kvpolicy_concurrency_ratio", None] == 6 * MAX_MODEL_LEN / kept
        assert found["vllm:kvpolicy_entries_per_head", "mean"] == kept / 6


def test_installing_twice_does_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs

    hooks.install()
    made = EngineArgs.create_engine_config
    hooks.install()
    assert EngineArgs.create_engine_config is made and not hasattr(made.__wrapped__, "__wrapped__")


def test_self_check_runs_at_start(model: str, plan: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpolicy_vllm import backend

    calls: list[tuple[torch.dtype, int]] = []
    monkeypatch.setattr(backend, "check_attention", lambda device, dtype, dim: calls.append((dtype, dim)))
    engine({"plan": plan, **FIXED})
    assert set(calls) == {(torch.float32, 32)}
