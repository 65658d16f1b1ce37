"""A tiny random model, engines over it, and what they must say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",  # else vLLM compiles what counts ranks of log-probabilities, for half a minute
)

import pytest
import torch
import transformers

import kvpolicy

CAPACITIES = [[16, 64], [40, 12], [128, 24]]
VOCABULARY = 256
MAX_MODEL_LEN = 512


def on_a_gpu(*values: Any) -> Any:
    """A case of a parametrised test that needs a GPU."""
    return pytest.param(*values, marks=pytest.mark.gpu)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama of 3 layers, 4 query heads and 2 KV heads."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config)
    for parameter in made.parameters():  # wide enough that what attention sees decides the next token
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def plan(model: str, tmp_path: Path) -> str:
    """A plan file with ragged capacities of 512 tokens."""
    return save_plan(model, tmp_path / "plan.json", CAPACITIES)


def save_plan(model: str, path: Path, capacities: list[list[int]], **options: Any) -> str:
    spec = kvpolicy.ModelSpec.from_config(transformers.AutoConfig.from_pretrained(model))
    made = kvpolicy.BudgetPlan.from_capacities(spec, capacities, context_length=MAX_MODEL_LEN, **options)
    kvpolicy.save_plan(made, path)
    return str(path)


@pytest.fixture
def engine(model: str) -> Iterator[Any]:
    """Makes vLLM engines over the model, one at a time."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    made: list[Any] = []

    def make(settings: dict[str, Any] | None = None, **options: Any) -> Any:
        close()
        additional = {} if settings is None else {"additional_config": {"kvpolicy": settings}}
        common = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8, "dtype": "float32", "enforce_eager": True}
        made.append(LLM(**{"model": model, "skip_tokenizer_init": True, **common, **additional, **options}))
        return made[-1]

    def close() -> None:
        if made:
            made.pop().llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()
            type(current_platform)._global_graph_pool = None  # it is gone with its graphs, and vLLM would take it again

    yield make
    close()


def prompts(lengths: list[int]) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def answers(llm: Any, asked: list[list[int]], num_tokens: int) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens of each prompt, and the log-probability of each token."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in asked], sampling, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return [
        (list(one.token_ids), torch.tensor([next(iter(step.values())).logprob for step in one.logprobs]))
        for one in found
    ]
