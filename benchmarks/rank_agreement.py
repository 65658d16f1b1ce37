"""Do the readings of "input and output of a head" rank the KV heads alike, and does the ranking depend on the text?

Spearman's rank correlation of the importance of all KV heads, between the variants of the `cosine` estimator, and of
each variant with itself on other text.

    python benchmarks/rank_agreement.py [--context 1024] [--out rank_agreement.csv]
"""

from __future__ import annotations

import argparse
import csv
import itertools

import torch
import transformers
from scipy.stats import spearmanr

import kvpolicy
from kvpolicy import TransformersProbe, registry

VARIANTS = ("value", "slice", "proj", "proj_residual")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--out")
    options = parser.parse_args()
    model, tokenizer = kvpolicy.load_model()
    corpus = kvpolicy.read_corpus(tokenizer)
    texts = {part: list(corpus.sequences(part, 6, options.context)) for part in ("search", "heldout")}
    ranked = {}
    for variant, (part, prompts) in itertools.product(VARIANTS, texts.items()):
        probe = TransformersProbe(model, prompts[0][None], prompts)
        estimator = registry.create("estimator", "cosine", {"head_input": variant})
        ranked[variant, part] = estimator.estimate(probe).per_head.flatten().tolist()
    pairs = [((a, "search"), (b, "search")) for a, b in itertools.combinations(VARIANTS, 2)]
    pairs += [((variant, "search"), (variant, "heldout")) for variant in VARIANTS]
    rows = [
        {
            "a": a[0],
            "b": b[0],
            "texts": "same" if a[1] == b[1] else "different",
            "spearman": round(float(spearmanr(ranked[a], ranked[b]).statistic), 3),
            "kv_heads": len(ranked[a]),
            "prompts": len(texts["search"]),
            "context": options.context,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        for a, b in pairs
    ]
    for row in rows:
        print(*row.values(), sep="\t")
    if options.out:
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
