r"""What codes of 8 and 4 bits lose with everything kept, of keys encoded whole and less their centre.

    python benchmarks/key_centre.py --model qwen05.gguf --text pg19.txt wiki.txt python --device cuda \
        --prompt 4096 8192 16384 32256 --out benchmarks/results/key_centre_h200.csv

Nothing is evicted of a prompt, and the tokens behind it are scored in one forward over what the cache gives back:
perplexity, and the divergence from the full cache, KL(full || row). With `--protocol window` every token is decoded
under the format, and the last three quarters are scored. With `--left` no text is run: what a centre leaves of the
turned mean of keys (`mean_keys`). Of a text that is too short for as many sequences there are as many as it holds, and
of a length that none holds there are no rows. Rows are written as they come, and those that are there are not measured
again. Rows whose keys are "less their bias", "less eight pairs and a mean" or "less their bias's mean over N positions"
are of former centres, all of the bias of `k_proj` alone, "whole" and "less their centre" of what the library has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from formats_frontier import WindowStudy, judged
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat
from shared import command_line, machine, read_csv, write_csv
from torch import Tensor

import kvpolicy
from kvpolicy import ModelSpec
from kvpolicy.comparison.methods import read_asked
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.key_centre import WAVES, key_centres
from kvpolicy.integrations.transformers.attention.mean_key import mean_keys
from kvpolicy.integrations.transformers.attention.rotary import rotary_of
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.measure.stats import mean_interval

ROWS: dict[tuple[str, str], EntryFormat | None] = {
    ("model", ""): None,
    ("int8", "whole"): replace(INT8, centred=False),
    ("int8", "less their centre"): replace(INT8, centred=True),
    ("int4", "less their centre"): INT4,
    ("int4", "whole"): replace(INT4, centred=False),
}


RANGES = (0, 1024, 4096, 8192, 16384, 32768, 65536, 131072)
SAMPLES = 400  # positions of a range, evenly


class Prompts:
    """Prompts behind which tokens are scored; logits of the full cache."""

    def __init__(self, model: Any, sequences: Tensor, prompt: int) -> None:
        self.model, self.sequences, self.prompt = model, sequences, prompt
        self.full: list[Tensor] = []

    def means(self, own: EntryFormat | None) -> list[Tensor]:
        """Losses and divergences, [n] each."""
        judgements = [
            judged(self.full, index, self._logits(ids, own), ids[self.prompt :])
            for index, ids in enumerate(self.sequences)
        ]
        return [torch.stack([x.mean() for x in each]).double().cpu() for each in zip(*judgements, strict=True)]

    @torch.no_grad()
    def _logits(self, ids: Tensor, own: EntryFormat | None) -> Tensor:
        """[n, vocabulary] behind each token from the last of the prompt on, but the last."""
        cache = kvpolicy.new_cache(self.model, retention=1.0, format=own)
        options = with_cache(self.model, cache)
        before = self.model(ids[None, : self.prompt], **options, use_cache=True, logits_to_keep=1).logits
        after = self.model(ids[None, self.prompt : -1], **options, use_cache=True).logits
        return torch.cat([before, after], 1)[0]


class Decoded:
    """Sequences whose every token is decoded."""

    def __init__(self, model: Any, sequences: Tensor) -> None:
        self.study = WindowStudy(model, sequences)

    def means(self, own: EntryFormat | None) -> list[Tensor]:
        method = replace(read_asked(["streaming"])[0], entry_format=own)
        whole = torch.full(self.study.spec.table_shape, self.study.sequences.shape[1])
        return [torch.tensor(each, dtype=torch.float64) for each in self.study.measured(method, whole, {})[:2]]


@torch.no_grad()
def left_over(model: Any) -> list[dict[str, Any]]:
    """The root of the mean square of turned mean less centre in a head, and the largest of a head, in each range.

    size, spread: the same of the mean itself, and of keys less their mean
    """
    spec = ModelSpec.from_config(model.config)
    attentions = [attention for attention, _ in attention_modules(model, spec.budgeted_layers)]
    centres = [centre for centre in key_centres(model, spec) if centre is not None]
    if not centres:
        raise SystemExit("how this model turns its keys is not known")
    of_layers, keys = [], mean_keys(model, attentions)
    for centre, attention, (mean, _) in zip(centres, attentions, keys, strict=True):
        rotary, of_ranges = rotary_of(attention), []
        for first, last in pairwise(RANGES):
            positions = torch.linspace(first, last - 1, SAMPLES).round().to(mean.device)
            angles = positions.double()[:, None] * rotary.frequencies
            turned = rotary.turned(mean[:, None].expand(-1, SAMPLES, -1), angles.cos().float(), angles.sin().float())
            rest = turned - centre.of(torch.arange(len(mean), device=mean.device)[:, None], positions.long())
            of_ranges.append(rest.square().sum(-1).mean(-1))
        of_layers.append(torch.stack(of_ranges, 1))
    heads = torch.cat(of_layers)  # [heads of all layers, ranges]
    moving = sum(centre.frequencies.shape[1] > 0 for centre in centres)
    sizes = (float(own.mean.square().sum()) for own in keys)
    size, spread = (round(math.sqrt(sum(x) / len(heads)), 3) for x in (sizes, (own.spread for own in keys)))
    return [
        {"of": "mean", "waves": f"{WAVES} in {moving} of {len(centres)} layers", "first": first, "last": last - 1,
         "left": round(float(own.mean().sqrt()), 3), "worst_head": round(float(own.max().sqrt()), 3),
         "heads": len(own), "size": size, "spread": spread}
        for (first, last), own in zip(pairwise(RANGES), heads.T, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", nargs="+", default=["python"], help="files, or 'python' for CPython's own reference")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, nargs="+", default=[1024])
    parser.add_argument("--protocol", choices=["prompt", "window"], default="prompt")
    parser.add_argument("--behind", type=int, default=512, help="tokens behind a prompt")
    parser.add_argument("--sequences", type=int, default=2, help="of each text")
    parser.add_argument("--left", action="store_true", help="what a centre leaves of the turned mean of keys")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model(options.model, dtype=options.dtype, device=options.device)
    if options.left:
        write_csv(options.out, [row | {"model": Path(options.model).name} for row in left_over(model)])
        return
    texts = [kvpolicy.read_corpus(tokenizer, None if name == "python" else name) for name in options.text]
    lines: list[dict[str, Any]] = [*read_csv(options.out)] if options.out.exists() else []
    for prompt in options.prompt:
        decoded = options.protocol == "window"
        length = prompt + options.behind * (not decoded)
        counts = [min(options.sequences, text.room("whole", length)) for text in texts]
        whole = [text.sequences("whole", count, length) for text, count in zip(texts, counts, strict=True) if count]
        if not whole:
            print(f"no text holds a prompt of {prompt}", flush=True)
            continue
        used = [Path(name).stem for name, count in zip(options.text, counts, strict=True) if count]
        about = {
            "n": sum(counts), "prompt": prompt, "scored": prompt - prompt // 4 if decoded else options.behind,
            "model": Path(options.model).name,
            "dtype": options.dtype, "texts": " ".join(used), **machine(options.device, "torch", "transformers"),
            "protocol": options.protocol,
        }  # fmt: skip
        ids = torch.cat(whole).to(model.device)
        report(Decoded(model, ids) if decoded else Prompts(model, ids, prompt), about, lines, options.out)


def report(study: Prompts | Decoded, about: dict[str, Any], lines: list[dict[str, Any]], out: Path) -> None:
    """Adds the rows of a length to `lines` and writes them, but for those that are there."""
    own = [str(about[name]) for name in ("prompt", "texts", "protocol")]
    there = {(x["format"], x["keys"]) for x in lines if [str(x[y]) for y in ("prompt", "texts", "protocol")] == own}
    if there >= ROWS.keys():
        return
    for (name, keys), entry_format in ROWS.items():
        if (name, keys) in there and entry_format is not None:
            continue
        losses, divergences = study.means(entry_format)
        if (name, keys) in there:  # the full cache, which others are compared with
            continue
        low, high = mean_interval(divergences)
        lines.append(
            {"format": name, "keys": keys, "perplexity": round(float(losses.mean().exp()), 3),
             "kl": round(float(divergences.mean()), 5), "kl_low": round(low, 5), "kl_high": round(high, 5),
             **about, "each_kl": " ".join(f"{kl:.5f}" for kl in divergences.tolist())}
        )  # fmt: skip
        print(*own[::2], *list(lines[-1].values())[:7], sep="\t", flush=True)
        write_csv(out, lines)


if __name__ == "__main__":
    main()
