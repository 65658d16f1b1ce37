"""The table and the picture of docs/results.md on eviction policies, from what policy_table.py found.

    python benchmarks/plot_policies.py benchmarks/results/passkey_h100.json docs/images

Prints Markdown: the part of the pass keys that each policy finds under each allocation, with 95 % bootstrap intervals
over the prompts. Writes policies.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from policy_table import ALLOCATORS, POLICIES
from shared import command_line

from kvpolicy.comparison.results_file import Comparison, load_comparison
from kvpolicy.measure.stats import mean_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def cell(found: Comparison, policy: str, allocator: str, level: float) -> tuple[float, str]:
    """The part that is found, and the same in words."""
    hits = 1 - found.at(f"{policy}/{allocator}", level).values()
    low, high = mean_interval(hits)
    part = float(hits.mean())
    return part, f"{part:.2f} ({low:.2f} to {high:.2f})" if high - low > 1e-6 else f"{part:.2f}"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("comparison", type=Path, help="of policy_table.py")
    parser.add_argument("images", type=Path, help="folder")
    options = parser.parse_args()
    found, images = load_comparison(options.comparison), options.images
    columns = [(level, allocator) for level in found.levels for allocator in ALLOCATORS]
    heads = [f"{level:.0%}, {allocator}" for level, allocator in columns]
    print(f"| policy | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
    parts = []
    for policy in POLICIES:
        cells = [cell(found, policy, allocator, level) for level, allocator in columns]
        print(f"| `{policy}` | {' | '.join(said for _, said in cells)} |")
        parts.append([part for part, _ in cells])
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    axis.imshow(parts, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for row, values in enumerate(parts):
        for column, value in enumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.7 else "black")
    axis.axvline(len(ALLOCATORS) - 0.5, color="white", linewidth=4)
    axis.set_xticks(range(len(heads)), [f"{level:.0%} kept\n{allocator}" for level, allocator in columns], fontsize=9)
    axis.set_yticks(range(len(POLICIES)), POLICIES, fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"pass keys found, {len(found.at('full', 1.0).losses)} prompts of 4096 tokens", fontsize=10)
    figure.savefig(images / "policies.png", dpi=130)


if __name__ == "__main__":
    main()
