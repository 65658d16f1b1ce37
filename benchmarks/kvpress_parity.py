"""Which entries do the presses of kvpress keep? `tests/plugins/test_kvpress_parity.py` compares ours with the answer.

Runs in an environment of its own, for kvpress 0.5.5 needs transformers below 5.3:

    pip install kvpress==0.5.5
    python benchmarks/kvpress_parity.py WEIGHTS benchmarks/results/kvpress_parity.json

WEIGHTS is a directory with the model as safetensors, its config and `tokenizer.json`. From the environment of kvpolicy:

    model, tokenizer = kvpolicy.load_model()
    model.save_pretrained("WEIGHTS"), tokenizer.save_pretrained("WEIGHTS")

The presses are used as their users use them. What a press kept is read off the cache: its keys are looked up among
those of a prefill without a press.

    python benchmarks/kvpress_parity.py WEIGHTS benchmarks/results/kvpress_channels.json --channels

writes down instead which key channels ThinKPress leaves, for the format `think`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

TOPICS = ("assignment", "debugger", "import")  # pages of Python's language reference
LENGTH = 300
RETENTIONS = (0.5, 0.3)


def presses() -> dict[str, Callable[[float], Any]]:
    """By the name of the policy; parameters are those of the policy's defaults."""
    import kvpress  # not in the environment of kvpolicy, where --help works too

    return {
        "snapkv": lambda ratio: kvpress.SnapKVPress(ratio, window_size=32, kernel_size=5),
        "tova": kvpress.TOVAPress,
        "l2norm": kvpress.KnormPress,
        "keydiff": kvpress.KeyDiffPress,
        "expected_attention": kvpress.ExpectedAttentionPress,
        "streaming": kvpress.StreamingLLMPress,
    }


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The keys of each layer afterwards, [H, n, dim]."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return [layer.keys[0] for layer in cache.layers]


def kept_positions(kept: Tensor, keys: Tensor) -> list[list[int]]:
    """Of each head, where the keys `kept` [H, m, dim] lie in `keys` [H, n, dim]."""
    equal = (kept[:, :, None] == keys[:, None]).all(-1)
    if not bool((equal.sum(-1) == 1).all()):
        raise SystemExit("a key that was kept is not found exactly once among all keys")
    return [sorted(row) for row in equal.int().argmax(-1).tolist()]


def kept_channels(keys: Tensor) -> list[list[int]]:
    """Of each head, the channels that are not zero in every key. keys: [H, n, dim]"""
    return [row.nonzero()[:, 0].tolist() for row in (keys != 0).any(1)]


def as_hex(positions: list[int]) -> str:
    """Bit p stands for position p."""
    return f"{sum(1 << position for position in positions):x}"


def channel_runs(model: PreTrainedModel, prompts: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Which channels ThinKPress leaves of each KV head's keys, 0.6 of them."""
    import kvpress

    press, runs = kvpress.ThinKPress(key_channel_compression_ratio=0.4), []
    for topic, ids in prompts.items():
        with press(model):
            kept = prefill(model, torch.tensor([ids]))
        channels = [[as_hex(head) for head in kept_channels(layer)] for layer in kept]
        runs.append({"prompt": topic, "parameters": dataclasses.asdict(press), "kept": channels})
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", action="store_true", help="of ThinKPress, instead of the entries of the others")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.weights, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(options.weights / "tokenizer.json"))
    prompts = {topic: tokenizer.encode(topics[topic]).ids[:LENGTH] for topic in TOPICS}
    runs: list[dict[str, Any]] = channel_runs(model, prompts) if options.channels else []
    for topic, ids in () if options.channels else prompts.items():
        keys = prefill(model, torch.tensor([ids]))
        for name, make in presses().items():
            for retention in RETENTIONS:
                press = make(1 - retention)
                with press(model):
                    kept = prefill(model, torch.tensor([ids]))
                heads = [kept_positions(*layer) for layer in zip(kept, keys, strict=True)]
                run = {"policy": name, "prompt": topic, "retention": retention, "entries": kept[0].shape[1]}
                run |= {"press": type(press).__name__, "parameters": dataclasses.asdict(press)}
                runs.append(run | {"kept": [[as_hex(head) for head in layer] for layer in heads]})
                print(topic, name, retention, kept[0].shape[1], flush=True)
    weights = hashlib.sha256((options.weights / "model.safetensors").read_bytes()).hexdigest()
    result = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch", "tokenizers")},
        "python": platform.python_version(),
        "weights": {"sha256 of model.safetensors": weights, "dtype": "float32"},
        "prompts": prompts,
        "runs": runs,
    }
    options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
