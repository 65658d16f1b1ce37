r"""The same weights and prompts under kvpolicy, kvpress and transformers' own caches, in one CSV.

    python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5
    python benchmarks/peers/head_to_head.py --kvpress kvpress-env/bin/python --out peers.csv

A number stands in a context, which is compressed before its question comes. Columns: the part of the numbers that is
said, and said again in a second turn; bytes that the cache really holds behind the context; seconds of the context's
forward and milliseconds a token of the answer, plain loops everywhere; and whether two prompts of different lengths
give the same tokens in one left-padded batch as they do alone. kvpress 0.5.5 needs transformers below 5.3, so it runs
in an environment of its own; without --kvpress its rows are left out. A picture of it lies beside the CSV, OUT.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import kvpolicy
from kvpolicy.integrations.transformers import attached, cache_nbytes, detached, new_cache, quantized_cache, with_cache
from kvpolicy.tasks.family import task_of

sys.path.insert(0, str(Path(__file__).parent))
from conversation import Peer, Prompt, measured, positions, stock_bytes
from peers_picture import picture

METHODS = (
    ("snapkv", "uniform"), ("expected_attention", "uniform"), ("keydiff", "uniform"), ("streaming", "uniform"),
    ("snapkv", "adakv"),
)  # fmt: skip
QUANTIZED = ("fp8", "int4")
TIMES = ("prefill_seconds", "ms_a_token")


def main() -> None:
    options = parsed()
    model, tokenizer = kvpolicy.load_model(options.model, device=options.device, dtype=options.dtype)
    samples = task_of("passkey").samples(tokenizer, options.limit, options.context, options.seed)
    prompts = [Prompt([*one.context], [*one.questions[0]], one.turns[0].answers[0]) for one in samples]
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = [row | about for row in own_rows(model, tokenizer, prompts, options)]
    if options.kvpress is not None:
        rows += kvpress_rows(model, tokenizer, prompts, options)
    if options.no_timing:
        rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    settings = {"model": Path(options.model).name, "device": options.device, "dtype": options.dtype}
    settings |= {"context": options.context, "seed": options.seed}
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *settings])
        writer.writeheader()
        writer.writerows(row | settings for row in rows)
    picture([row | settings for row in rows], options.out.with_suffix(".png"))


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", type=Path, help="the python of an environment with kvpress")
    parser.add_argument("--out", type=Path, default=Path("peers.csv"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=512, help="tokens of a prompt, question included")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--retentions", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-timing", action="store_true", help="leave times out, as where others use the machine")
    return parser.parse_args()


def own_rows(model: Any, tokenizer: Any, prompts: list[Prompt], options: Any) -> list[dict[str, Any]]:
    rows = []
    for peer in peers(model, options.retentions):
        try:
            row = measured(peer, model, tokenizer, prompts, options.new_tokens)
        except Exception as error:  # a peer that cannot is a row that says so
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        rows.append({"tool": peer.tool, "method": peer.method, "kept": peer.kept, **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def peers(model: Any, retentions: list[float]) -> Iterator[Peer]:
    (name,) = with_cache(model, None)
    stock = {"using": partial(detached, model), "cache_name": name}
    dense = partial(prefill, model, lambda: DynamicCache(config=model.config))
    yield Peer("transformers", "DynamicCache", 1.0, dense, stock_bytes, **stock)
    for kind in QUANTIZED:
        make = partial(prefill, model, partial(quantized_cache, model, kind))
        yield Peer("transformers", f"QuantizedCache {kind}", 1.0, make, cache_nbytes, **stock)
    for policy, allocator in METHODS:
        for kept in retentions:
            budget = {"policy": policy, "allocator": allocator, "retention": kept, "min_tokens": 1, "decode": "append"}
            make = partial(prefill, model, partial(new_cache, model, **budget))
            label = policy if allocator == "uniform" else f"{policy}/{allocator}"
            using = partial(attached, model)
            yield Peer("kvpolicy", label, kept, make, lambda cache: cache.nbytes, using, name)


def prefill(model: Any, make: Any, ids: Tensor, mask: Tensor | None) -> tuple[Any, Tensor]:
    cache = make()
    given = {} if mask is None else positions(mask)
    return cache, model(ids, **with_cache(model, cache), **given, use_cache=True).logits


def kvpress_rows(model: Any, tokenizer: Any, prompts: list[Prompt], options: Any) -> list[dict[str, Any]]:
    """What `kvpress_side.py` prints in the other environment."""
    with tempfile.TemporaryDirectory() as folder:
        with detached(model):
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        task = {"weights": folder, "device": options.device, "dtype": options.dtype, "new_tokens": options.new_tokens}
        task |= {"retentions": options.retentions, "prompts": [vars(prompt) for prompt in prompts]}
        path = Path(folder) / "task.json"
        path.write_text(json.dumps(task))
        command = [options.kvpress, Path(__file__).with_name("kvpress_side.py"), path]
        result = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    print(result.stdout, end="", flush=True)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()
