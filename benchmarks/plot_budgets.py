"""The tables and pictures of docs/results.md on measured and learned budgets, from what measured_budgets.py found.

    python benchmarks/plot_budgets.py benchmarks/results/budgets_h100 docs/images

Prints Markdown: which part of uniform's excess perplexity each plan leaves, for each text and on average of the texts,
with 95 % bootstrap intervals (sequences drawn again within each text, 10 000 times). First decoded from the first token
on, of which it draws budgets.png, then behind a prompt, as far as all texts have the rows. Last what every method adds
to the full cache's perplexity behind a prompt, on average of the texts that have all of them, which all_policies.png
draws too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from shared import command_line
from torch import Tensor

from kvpolicy.comparison.results_file import Comparison, load_comparison

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLANS = {  # colour, name
    "learned.json": ("#1b6ca8", "learned"),
    "power.json": ("#e08e45", "sensitivity, power"),
    "power24.json": ("#b3541e", "sensitivity, power, 24 sequences"),
    "hull.json": ("#6aa84f", "sensitivity, hull"),
    "baklava.json": ("#8e7cc3", "cosine, baklava"),
}
BEHIND = (
    "learned.json", "power.json", "hull.json", "baklava.json", "snapkv_learned.json", "snapkv/learned.json",
    "snapkv/power.json", "snapkv/hull.json", "snapkv/baklava.json", "snapkv/adakv",
)  # fmt: skip
POLICIES = (
    "quantized/int4", "quantized/int2", "random/uniform", "streaming/uniform", "learned.json", "power.json",
    "snapkv/uniform", "snapkv/adakv", "snapkv_learned.json", "snapkv/power.json", "expected_attention/uniform",
    "expected_attention/adakv", "kv_compress/uniform", "kv_compress/kv_compress", "h2o/uniform", "tova/uniform",
    "l2norm/uniform", "keydiff/uniform", "corm/uniform", "r_kv/uniform", "kvzip/uniform",
)  # fmt: skip
DRAWN = {  # over all other methods, in grey: colour, name
    "snapkv_learned.json": ("#1b6ca8", "snapkv, learned for it"),
    "snapkv/power.json": ("#b3541e", "snapkv, sensitivity"),
    "learned.json": ("#6fb1e0", "window rule, learned"),
    "h2o/uniform": ("#6aa84f", "h2o, uniform"),
    "expected_attention/uniform": ("#8e7cc3", "expected_attention, uniform"),
    "snapkv/uniform": ("black", "snapkv, uniform"),
}
RESAMPLES = 10_000


def excess(found: Comparison, method: str, level: float, seed: int) -> tuple[float, Tensor]:
    """What a method adds to the full cache's perplexity, as a part of it, and the same of each resample."""
    more = found.at(method, level).values() - found.at("full", 1.0).values()
    picks = torch.randint(len(more), (RESAMPLES, len(more)), generator=torch.Generator().manual_seed(seed))
    return math.expm1(more.mean()), torch.expm1(more[picks].mean(1))


def share(found: Comparison, method: str, level: float, seed: int) -> tuple[float, Tensor]:
    """What is left of the excess perplexity of uniform budgets under the same policy, and the same of each resample."""
    ours, uniform = (excess(found, name, level, seed) for name in (method, found.at(method, level).uniform))
    return ours[0] / uniform[0], ours[1] / uniform[1]


def bounds(resamples: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(resamples, torch.tensor([0.025, 0.975], dtype=resamples.dtype)).tolist()
    return low, high


def row(texts: list[Comparison], method: str, level: float) -> tuple[list[float], float, float, float, str]:
    """The share of each text, their mean with its bounds, and a line of the table."""
    found = [share(each, method, level, seed) for seed, each in enumerate(texts)]
    mean, (low, high) = sum(x for x, _ in found) / len(found), bounds(torch.stack([x for _, x in found]).mean(0))
    cells = [f"{x:.2f} ({a:.2f} to {b:.2f})" for x, (a, b) in ((x, bounds(draws)) for x, draws in found)]
    return [x for x, _ in found], mean, low, high, f"{' | '.join(cells)} | **{mean:.3f}** ({low:.3f} to {high:.3f}) |"


def head(texts: dict[str, Comparison]) -> str:
    counts = [f"{name} (n = {len(found.at('full', 1.0).losses)})" for name, found in texts.items()]
    return f"| kept | method | {' | '.join(counts)} | mean of the texts |\n{'|---' * (len(texts) + 3)}|"


def read(folder: Path, protocol: str) -> dict[str, Comparison]:
    paths = sorted(folder.glob(f"{protocol}_*.json"))
    return {path.stem.removeprefix(f"{protocol}_"): load_comparison(path) for path in paths}


def table(texts: dict[str, Comparison], named: dict[str, str]) -> None:
    """Prints what all texts have of these methods."""
    print(head(texts))
    comparisons = list(texts.values())
    for level in comparisons[0].levels:
        for method, said in named.items():
            if all(found.at(method, level) for found in comparisons):
                print(f"| {level:.0%} | {said} | {row(comparisons, method, level)[-1]}")


def levels_of(method: str, levels: Sequence[float]) -> Sequence[float]:
    """A quantized cache keeps every token."""
    return (1.0,) if method.startswith("quantized") else levels


def policies(texts: dict[str, Comparison]) -> list[Comparison]:
    """Prints what each method adds to the full cache's perplexity, in percent. Returns the texts with all methods."""
    levels = next(iter(texts.values())).levels
    complete = {
        name: found
        for name, found in texts.items()
        if all(found.at(method, level) for method in POLICIES for level in levels_of(method, levels))
    }
    print(f"Above the full cache on {', '.join(complete) or 'no text, as none has all methods'}:\n")
    if complete:
        print(f"| method | {' | '.join(f'{level:.0%}' for level in levels)} |\n{'|---' * (len(levels) + 1)}|")
    for method in POLICIES if complete else ():
        cells = []
        for level in levels_of(method, levels):
            mean, low, high = added(list(complete.values()), method, level)
            cells.append(f"{mean:.1f} ({low:.1f} to {high:.1f})")
        print(f"| `{method.replace('.json', '')}` | {' | '.join(cells)} |{' |' * (len(levels) - len(cells))}")
    return list(complete.values())


def added(texts: list[Comparison], method: str, level: float) -> tuple[float, float, float]:
    """The mean of the texts and its bounds, in percent."""
    drawn = [excess(found, method, level, seed) for seed, found in enumerate(texts)]
    low, high = bounds(torch.stack([draws for _, draws in drawn]).mean(0))
    return 100 * sum(x for x, _ in drawn) / len(drawn), 100 * low, 100 * high


def draw_policies(texts: list[Comparison], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for method in (*(method for method in POLICIES if method not in DRAWN), *DRAWN):
        levels = levels_of(method, texts[0].levels)
        rows = [texts[0].at(method, level) for level in levels]
        held = [100 * row.bytes / row.dense_bytes for row in rows]
        mean, low, high = zip(*(added(texts, method, level) for level in levels), strict=True)
        if method.startswith("quantized"):
            said = f"{method.removeprefix('quantized/')}, all tokens"
            axis.plot(held, mean, "*", color="#c0392b", ms=11)
            axis.annotate(said, (held[0], mean[0]), (0, 8), textcoords="offset points", fontsize=8, ha="center")
        elif method in DRAWN:
            colour, said = DRAWN[method]
            axis.plot(held, mean, "o-", color=colour, ms=4, label=said)
            axis.fill_between(held, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axis.plot(held, mean, "o-", color="0.8", ms=4, linewidth=1)
    axis.plot([], [], "o-", color="0.8", ms=4, linewidth=1, label="all others")
    axis.set(xscale="log", yscale="log", xlabel="bytes, percent of the full cache", ylabel="perplexity added, percent")
    axis.set_xticks([5, 10, 16, 28, 50], ["5", "10", "16", "28", "50"])
    axis.set_yticks([0.1, 0.3, 1, 3, 10, 30, 100], ["0.1", "0.3", "1", "3", "10", "30", "100"])
    axis.minorticks_off()
    axis.set_title("SmolLM2-135M, behind a prompt of 2048 tokens: mean of four texts, 95 % intervals", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw(texts: list[Comparison], path: Path) -> None:
    levels = texts[0].levels
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axis.axhline(1, color="0.5", linewidth=1, linestyle=":")
    axis.annotate(" uniform", (1, 1), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    for place, level in enumerate(levels):
        for index, (method, (colour, said)) in enumerate(PLANS.items()):
            found, mean, low, high, _ = row(texts, method, level)
            x = place + 0.17 * (index - (len(PLANS) - 1) / 2)
            axis.bar(x, mean, 0.15, color=colour, label=said if not place else None)
            axis.errorbar(x, mean, [[mean - low], [high - mean]], color="black", linewidth=1, capsize=2)
            axis.plot([x] * len(found), found, "o", color="white", markeredgecolor="black", ms=3)
    axis.set_xticks(range(len(levels)), [f"{level:.0%} kept" for level in levels])
    axis.set_ylabel("perplexity added, as a part of\nwhat uniform budgets add")
    axis.set_title("SmolLM2-135M, 4096 tokens: means of four texts, 95 % intervals; circles are the texts", fontsize=9)
    axis.set_ylim(0, 1.4)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="of measured_budgets.py")
    parser.add_argument("images", type=Path, help="folder")
    options = parser.parse_args()
    folder, images = options.folder, options.images
    plans = {method: said for method, (_, said) in PLANS.items()}
    shuffled = {f"{method} shuffled": f"{said}, shuffled" for method, said in plans.items()}
    texts = read(folder, "window")
    table(texts, plans)
    print()
    table(texts, shuffled)
    print()
    behind = read(folder, "prompt")
    table(behind, {method: f"`{method.replace('.json', '')}`" for method in BEHIND})
    print()
    complete = policies(behind)
    draw(list(texts.values()), images / "budgets.png")
    if complete:
        draw_policies(complete, images / "all_policies.png")


if __name__ == "__main__":
    main()
