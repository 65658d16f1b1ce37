"""The other architectures whose layers all have a budget: tiny random ones, against the masked forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CAPACITIES, MAX_MODEL_LEN, VOCABULARY, answers, prompts, save_plan
from oracle import Oracle
from test_oracle import FIXED, check, layouts, lengths


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3"])
def test_tokens_equal_the_masked_forward(engine: Any, tmp_path: Path, name: str) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=128,  # vLLM takes 32 numbers a head of it for Qwen2
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in made.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    folder = str(tmp_path / "model")
    made.save_pretrained(folder)
    plan = save_plan(folder, tmp_path / "plan.json", CAPACITIES)
    llm = engine({"plan": plan, **FIXED}, model=folder, max_num_batched_tokens=37)
    asked = prompts([150, 7, 40, 301, *lengths(6, 37)])
    check(Oracle(folder, layouts()), asked, answers(llm, asked, 20))
