"""The presses of kvpress 0.5.5 on the prompts of `head_to_head.py`, which starts this in kvpress's environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from conversation import Peer, Prompt, measured, positions, stock_bytes
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
    about = {name: version(name) for name in ("torch", "transformers")}
    for name, make in presses().items():
        for kept in task["retentions"]:
            press = make(1 - kept)

            def prefill(ids: Tensor, mask: Tensor | None, press: Any = press) -> tuple[Any, Tensor]:
                cache = DynamicCache(config=model.config)
                given = {} if mask is None else positions(mask)
                with press(model):
                    return cache, model(ids, past_key_values=cache, **given).logits

            peer = Peer("kvpress " + version("kvpress"), name, kept, prefill, stock_bytes, nullcontext)
            try:
                row = measured(peer, model, tokenizer, prompts, task["new_tokens"])
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            print(json.dumps({"tool": peer.tool, "method": name, "kept": kept, **row, **about}), flush=True)


if __name__ == "__main__":
    main()
