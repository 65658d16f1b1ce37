"""vLLM's dense cache on the prompts of `head_to_head.py`, which starts this in an environment with vLLM.

Bytes are those of the blocks that a context fills. vLLM reserves the memory of all blocks at its start, so that there
is no peak to tell, and pads no batch: two prompts that run together are compared with each alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from conversation import Prompt, message
from tokenizers import Tokenizer

ROOM = 64  # tokens of questions and answers behind a context, at least
ON_A_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # else it compiles for half a minute what counts ranks of log-probabilities
}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    os.environ.update(ON_A_CPU if task["device"] == "cpu" else {})
    row: dict[str, Any] = {"tool": "vLLM", "method": "dense", "kept": 1.0}
    try:
        row |= {"tool": f"vLLM {vllm_version()}", **measured(task)}
    except Exception as error:
        row["error"] = message(error)
    print(json.dumps(row | {name: version(name) for name in ("torch", "transformers")}), flush=True)


def vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


def measured(task: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    prompts = [Prompt(**prompt) for prompt in task["prompts"]]
    longest = max(len(prompt.context) + 2 * len(prompt.question) for prompt in prompts) + 2 * task["new_tokens"]
    options = {"max_model_len": longest + ROOM, "max_num_seqs": 2, "dtype": task["dtype"], "skip_tokenizer_init": True}
    options |= {"gpu_memory_utilization": 0.4} if task["device"] != "cpu" else {"enforce_eager": True}
    engine = LLM(model=task["weights"], **options)
    tokenizer = Tokenizer.from_file(f"{task['weights']}/tokenizer.json")
    now = time.process_time if task["device"] == "cpu" else time.perf_counter  # as `conversation` does

    def answers(texts: list[list[int]], count: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
        return [[*output.outputs[0].token_ids] for output in outputs]

    def alone(text: list[int], count: int) -> tuple[list[int], float]:
        """Without blocks of prompts before, and its seconds."""
        engine.reset_prefix_cache()
        start = now()
        return answers([text], count)[0], now() - start

    count, first, second, begun, steps = task["new_tokens"], [], [], [], []
    alone(prompts[0].context, 2)  # whatever is made at the first call
    for prompt in prompts:
        text = [*prompt.context, *prompt.question]
        begun.append(alone(text, 1)[1])
        said, seconds = alone(text, count)
        steps.append((seconds - begun[-1]) / (count - 1))
        first.append(prompt.answer in tokenizer.decode(said))
        (again,) = answers([[*text, *said, *prompt.question]], count)
        second.append(prompt.answer in tokenizer.decode(again))
    row: dict[str, Any] = {
        "n": len(prompts),
        "score": sum(first) / len(first),
        "second_turn": sum(second) / len(second),
    }
    row["bytes"] = sum(block_bytes(engine, len(prompt.context), task["dtype"]) for prompt in prompts) / len(prompts)
    row |= {"bytes_elsewhere": 0, "padded_batch": together(answers, alone, prompts[:2], count)}
    return row | {"first_token_seconds": median(begun), "ms_a_token": 1e3 * median(steps)}


def together(answers: Any, alone: Any, prompts: list[Prompt], count: int) -> str:
    """As `conversation` compares two prompts of different lengths in one batch with each alone."""
    texts = [[*prompt.context[7 * index :], *prompt.question] for index, prompt in enumerate(prompts)]
    apart = [alone(text, count)[0] for text in texts]
    return "equal" if answers(texts, count) == apart else "differs"


def block_bytes(engine: Any, tokens: int, dtype: str) -> int:
    """Keys and values of all layers in the blocks that so many tokens fill."""
    import torch

    size = engine.llm_engine.vllm_config.cache_config.block_size
    config = engine.llm_engine.vllm_config.model_config.hf_text_config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * width * getattr(torch, dtype).itemsize
    return -(-tokens // size) * size * entry


if __name__ == "__main__":
    main()
