r"""The same weights and prompts under kvpolicy, kvpress, transformers' own caches and vLLM, in one CSV.

    python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5
    python benchmarks/peers/head_to_head.py --kvpress kvpress-env/bin/python --out peers.csv

A number stands in a context, which is compressed before its question comes. Columns: the part of the numbers that is
said, and said again in a second turn; bytes that the cache really holds behind the context, and those of it that lie
in other memory than the model's; the most that tensors take while the context is read, beyond the weights; seconds from
the context to the first token of the answer and milliseconds of each token behind it, medians over plain loops (vLLM
has its own), on a CPU the processor's time; and whether two prompts of different lengths give the same tokens in one
left-padded batch as they do alone. What a peer cannot do is its error.

kvpress 0.5.5 needs transformers below 5.3, so it runs in an environment of its own, or in several, to see what it does
under another transformers; --vllm is the python of an environment with vLLM. Without them their rows are left out.
`QuantizedCache int4` needs the package optimum-quanto. A picture of it all lies beside the CSV, OUT.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import kvpolicy
from kvpolicy.integrations.transformers import attached, detached, new_cache, quantized_cache, with_cache
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.tasks.family import task_of

sys.path.insert(0, str(Path(__file__).parent))
from conversation import Peer, Prompt, measured, message, positions, stock_bytes
from peers_picture import picture

METHODS = (
    ("snapkv", "uniform"), ("expected_attention", "uniform"), ("keydiff", "uniform"), ("streaming", "uniform"),
    ("snapkv", "adakv"),
)  # fmt: skip
QUANTIZED = ("fp8", "int4")
TIMES = ("first_token_seconds", "ms_a_token")


def main() -> None:
    options = parsed()
    model, tokenizer = kvpolicy.load_model(options.model, device=options.device, dtype=options.dtype)
    samples = task_of("passkey").samples(tokenizer, options.limit, options.context, options.seed)
    prompts = [Prompt([*one.context], [*one.questions[0]], one.turns[0].answers[0]) for one in samples]
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = [row | about for row in own_rows(model, tokenizer, prompts, options)]
    write(rows, options)
    sides = [("kvpress_side.py", path) for path in options.kvpress] + [("vllm_side.py", path) for path in options.vllm]
    for side in side_rows(model, tokenizer, prompts, options, sides) if sides else ():
        rows += side
        write(rows, options)


def write(rows: list[dict[str, Any]], options: Any) -> None:
    """The CSV and its picture; again behind each environment, so that a run that ends early leaves what it has."""
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
    parser.add_argument("--kvpress", type=Path, nargs="*", default=[], help="pythons of environments with kvpress")
    parser.add_argument("--vllm", type=Path, nargs="*", default=[], help="pythons of environments with vLLM")
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
    for peer in peers(model, options.retentions, len(prompts[0].context)):
        try:
            row = measured(peer, model, tokenizer, prompts, options.new_tokens)
        except Exception as error:  # a peer that cannot is a row that says so
            row = {"error": message(error)}
        rows.append({"tool": peer.tool, "method": peer.method, "kept": peer.kept, **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def peers(model: Any, retentions: list[float], context: int) -> Iterator[Peer]:
    """context: tokens that come before a question"""
    (name,) = with_cache(model, None)
    using, held = partial(detached, model), partial(stock_bytes, device=model.device)
    stock = {"using": using, "cache_name": name, "elsewhere": partial(held, elsewhere=True)}

    def own(method: str, kept: float, make: Any) -> Peer:
        return Peer("transformers", method, kept, partial(prefill, model, make), held, **stock)

    yield own("DynamicCache", 1.0, lambda: DynamicCache(config=model.config))
    yield own("DynamicCache, offloaded", 1.0, lambda: DynamicCache(config=model.config, offloading=True))
    for kind in QUANTIZED:
        yield own(f"QuantizedCache {kind}", 1.0, partial(quantized_cache, model, kind))
    for kept in retentions:
        yield own("sliding layers", kept, partial(sliding_cache, model, round(kept * context)))
    for policy, allocator in METHODS:
        for kept in retentions:
            budget = {"policy": policy, "allocator": allocator, "retention": kept, "min_tokens": 1, "decode": "append"}
            make = partial(prefill, model, partial(new_cache, model, **budget))
            label = policy if allocator == "uniform" else f"{policy}/{allocator}"
            yield Peer("kvpolicy", label, kept, make, lambda cache: cache.nbytes, partial(attached, model), name)


def sliding_cache(model: Any, tokens: int) -> Cache:
    """The cache of transformers that keeps the last tokens, in a model without sliding windows: prompts stay dense."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[DynamicSlidingWindowLayer(sliding_window=tokens + 1) for _ in range(layers)])


def prefill(model: Any, make: Any, ids: Tensor, mask: Tensor | None) -> tuple[Any, Tensor]:
    cache = make()
    given = {} if mask is None else positions(mask)
    return cache, model(ids, **with_cache(model, cache), **given, use_cache=True, **keep_logits(model)).logits


def side_rows(
    model: Any, tokenizer: Any, prompts: list[Prompt], options: Any, sides: Sequence[tuple[str, Path]]
) -> Iterator[list[dict[str, Any]]]:
    """What each script prints in another environment; one that fails is a row that says so.

    sides: a script of this folder, and a python
    """
    with tempfile.TemporaryDirectory() as folder:
        with detached(model):
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        task = {"weights": folder, "device": options.device, "dtype": options.dtype, "new_tokens": options.new_tokens}
        task |= {"retentions": options.retentions, "prompts": [vars(prompt) for prompt in prompts]}
        path = Path(folder) / "task.json"
        path.write_text(json.dumps(task))
        for script, python in sides:
            command = [python, Path(__file__).with_name(script), path]
            result = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
            lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
            print(*lines, sep="\n", flush=True)
            rows = [*map(json.loads, lines)]
            if result.returncode:
                tool = script.removesuffix("_side.py").replace("vllm", "vLLM")
                failed = {"tool": tool, "method": "all", "kept": 1.0}
                rows.append(failed | {"error": f"{script} ended with {result.returncode}"})
            yield rows


if __name__ == "__main__":
    main()
