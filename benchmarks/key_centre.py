r"""What codes of 4 bits lose where keys have a bias, encoded whole and less its mean over positions.

    python benchmarks/key_centre.py --model qwen05.gguf --text pg19.txt wiki.txt python --device cuda \
        --out benchmarks/results/key_centre_h200.csv

Nothing is evicted of a prompt, and the tokens behind it are scored in one forward over what the cache gives back:
perplexity, and the divergence from the full cache, KL(full || row). `positions` is how many the mean is taken over, a
constant of `key_centre.py` in the package; rows with another value of it were measured by changing it there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from formats_frontier import judged
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat
from shared import command_line, machine, write_csv
from torch import Tensor

import kvpolicy
from kvpolicy.integrations.transformers.attention.key_centre import POSITIONS
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.measure.stats import mean_interval

ROWS: dict[str, EntryFormat | None] = {
    "model": None, "int8": INT8, "int4": INT4, "int4, whole keys": replace(INT4, centred=False),
}  # fmt: skip


@torch.no_grad()
def measured(model: Any, ids: Tensor, prompt: int, own: EntryFormat | None) -> Tensor:
    """Logits [n, vocabulary] behind each token of `ids` from the last of the prompt on, but the last."""
    cache = kvpolicy.new_cache(model, retention=1.0, format=own)
    before = model(ids[None, :prompt], **with_cache(model, cache), use_cache=True, logits_to_keep=1).logits
    after = model(ids[None, prompt:-1], **with_cache(model, cache), use_cache=True).logits
    return torch.cat([before, after], 1)[0]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", nargs="+", default=["python"], help="files, or 'python' for CPython's own reference")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--behind", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="of each text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(options.model, dtype=options.dtype, device=options.device)
    texts = [kvpolicy.read_corpus(tokenizer, None if name == "python" else name) for name in options.text]
    length = options.prompt + options.behind
    sequences = torch.cat([text.sequences("whole", options.sequences, length) for text in texts]).to(model.device)
    full: list[Tensor] = []
    lines: list[dict[str, Any]] = []
    for name, own in ROWS.items():
        both = [
            judged(full, index, measured(model, ids, options.prompt, own), ids[options.prompt :])
            for index, ids in enumerate(sequences)
        ]
        losses, divergences = (torch.stack([x.mean() for x in each]).double().cpu() for each in zip(*both, strict=True))
        low, high = mean_interval(divergences)
        lines.append(
            {"format": name, "positions": POSITIONS if own is not None and own.centred else "",
             "perplexity": round(float(losses.mean().exp()), 3),
             "kl": round(float(divergences.mean()), 5), "kl_low": round(low, 5), "kl_high": round(high, 5),
             "n": len(losses), "prompt": options.prompt, "scored": options.behind,
             "model": Path(options.model).name, "dtype": options.dtype,
             "texts": " ".join(Path(name).stem for name in options.text),
             **machine(options.device, "torch", "transformers"),
             "each_kl": " ".join(f"{kl:.5f}" for kl in divergences.tolist())}
        )  # fmt: skip
        print(*list(lines[-1].values())[:6], sep="\t", flush=True)
        write_csv(options.out, lines)


if __name__ == "__main__":
    main()
