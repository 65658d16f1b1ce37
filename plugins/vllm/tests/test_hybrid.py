"""Layers with sliding windows keep vLLM's own caches beside layers with a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import MAX_MODEL_LEN, VOCABULARY, answers, prompts, save_plan
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.serving import Serving
from kvpolicy_vllm.settings import Settings
from oracle import Oracle
from test_oracle import answers_in_chunks, check, graph_options, lengths

import kvpolicy

TABLE = [[13, 40], [26, 19]]  # entries of a block of 64 tokens
SETTINGS = {"retention": sum(map(sum, TABLE)) / (4 * 64)}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Gemma 3: two layers of full attention, four with windows of 48 tokens."""
    folder = tmp_path_factory.mktemp("gemma")
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        sliding_window=48,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    made = transformers.Gemma3ForCausalLM(config)
    for parameter in made.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def hybrid_plan(gemma: str, tmp_path: Path) -> str:
    return save_plan(gemma, tmp_path / "plan.json", [[8 * slots for slots in row] for row in TABLE])


def layouts() -> list[BlockLayout]:
    """Of the layers with a budget."""
    return [BlockLayout.of(row, 64, 4, max_tokens=MAX_MODEL_LEN) for row in TABLE]


@pytest.mark.parametrize("chunk", [37, 512])
def test_gemma_equals_the_masked_forward(gemma: str, hybrid_plan: str, engine: Any, chunk: int) -> None:
    llm = engine({"plan": hybrid_plan, **SETTINGS}, model=gemma, max_num_batched_tokens=chunk, block_size=32)
    asked = prompts([150, 7, 40, 301, *lengths(12, chunk)])
    check(Oracle(gemma, layouts()), asked, answers(llm, asked, 20))


@pytest.mark.gpu
def test_gemma_on_a_gpu(gemma: str, hybrid_plan: str, engine: Any) -> None:
    """vLLM's own layers may multiply in tf32."""
    llm = engine({"plan": hybrid_plan, **SETTINGS}, model=gemma, **graph_options("FULL_DECODE_ONLY"))
    oracle = Oracle(gemma, layouts())
    for asked, found in answers_in_chunks(llm, {64: 6, 512: 6}):
        check(oracle, asked, found, tolerance=0.1)


def test_blocks_are_of_one_size(gemma: str, hybrid_plan: str) -> None:
    config = transformers.AutoConfig.from_pretrained(gemma)
    serving = Serving.resolve(Settings(hybrid_plan, **SETTINGS), config, MAX_MODEL_LEN, 1, 32)
    assert (serving.layers, serving.window_block, serving.tokens_per_block) == ((2, 5), 32, 64)
    assert [serving.rows(layer, 1) for layer in range(2)] == [64, 64]  # of 53 and 45; a window's block has 32 times 2
    assert serving.rows(0, 2) == 64  # of 40; 32 times 1


def test_what_cannot_stand_beside_windows_is_refused(gemma: str, hybrid_plan: str) -> None:
    config = transformers.AutoConfig.from_pretrained(gemma)
    with pytest.raises(kvpolicy.BudgetError, match="beside sliding windows capacities have to grow"):
        Serving.resolve(Settings(hybrid_plan, tokens=50, context_length=MAX_MODEL_LEN), config, MAX_MODEL_LEN, 1, 32)
    config.layer_types = ["full_attention"] * 4 + ["sliding_attention"] * 2
    spec = kvpolicy.ModelSpec.from_config(config)
    plan = kvpolicy.BudgetPlan.from_capacities(spec, [[64, 64]] * 4, context_length=MAX_MODEL_LEN)
    kvpolicy.save_plan(plan, hybrid_plan)
    with pytest.raises(kvpolicy.BudgetError, match=r"2 layers without a budget \(sliding\) beside 4 with one"):
        Serving.resolve(Settings(hybrid_plan, retention=64 / 512), config, MAX_MODEL_LEN, 1, 32)
