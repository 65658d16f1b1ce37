"""The presses of kvpress 0.5.5 on the prompts of `head_to_head.py`, which starts this in kvpress's environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from conversation import Peer, Prompt, measured, message, positions, stock_bytes
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


def presses() -> dict[str, Callable[[float], Any]]:
    """With the parameters of the policies that stand beside them."""
    import kvpress

    return {
        "snapkv": lambda ratio: kvpress.SnapKVPress(ratio, window_size=32, kernel_size=5),
        "expected_attention": kvpress.ExpectedAttentionPress,
        "keydiff": kvpress.KeyDiffPress,
        "streaming": kvpress.StreamingLLMPress,
        "snapkv/adakv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, window_size=32, kernel_size=5)),
    }


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    dtype = getattr(torch, task["dtype"])
    model = AutoModelForCausalLM.from_pretrained(task["weights"], dtype=dtype).to(task["device"]).eval()
    tokenizer = Tokenizer.from_file(f"{task['weights']}/tokenizer.json")
    prompts = [Prompt(**prompt) for prompt in task["prompts"]]
    tool, about = "kvpress " + version("kvpress"), {name: version(name) for name in ("torch", "transformers")}
    try:
        makers = presses()
    except Exception as error:  # as under a transformers that it was not made for
        print(json.dumps({"tool": tool, "method": "all presses", "kept": 1.0, "error": message(error), **about}))
        return
    for name, make in makers.items():
        for kept in task["retentions"]:
            press = make(1 - kept)

            def prefill(ids: Tensor, mask: Tensor | None, press: Any = press) -> tuple[Any, Tensor]:
                cache = DynamicCache(config=model.config)
                given = {} if mask is None else positions(mask)
                with press(model):
                    return cache, model(ids, past_key_values=cache, logits_to_keep=1, **given).logits

            peer = Peer(tool, name, kept, prefill, partial(stock_bytes, device=model.device), nullcontext)
            try:
                row = measured(peer, model, tokenizer, prompts, task["new_tokens"])
            except Exception as error:
                row = {"error": message(error)}
            print(json.dumps({"tool": tool, "method": name, "kept": kept, **row, **about}), flush=True)


if __name__ == "__main__":
    main()
