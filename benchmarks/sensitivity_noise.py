"""How far the ranks of `sensitivity` can be trusted: from the losses that a search wrote down while it profiled.

    python benchmarks/sensitivity_noise.py benchmarks/results/budgets_h100/power24.json.losses

Prints Markdown, a row for each size: how many KV heads lose something that can be told from nothing, and the rank
correlation of importance between disjoint sets of sequences, the mean of 200 draws.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from shared import command_line
from torch import Tensor

from kvpolicy.measure.ranks import rank_correlation

SIZES = ("1/32", "1/8", "1/2")  # the estimator's own, in the order in which a head is shrunk
SEQUENCES = (4, 8, 12)
DRAWS = 200


def increases(path: Path) -> Tensor:
    """float64 [heads, sizes, sequences], above the loss with nothing evicted, which was measured first."""
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    losses = torch.tensor([row for line in lines for row in json.loads(line).values()], dtype=torch.float64)
    return (losses[1:] - losses[0]).unflatten(0, (-1, len(SIZES)))


def agreement(found: Tensor, count: int) -> float:
    """Of importance on `count` sequences with that on as many others. found: [heads, sequences]."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(DRAWS):
        order = torch.randperm(found.shape[1], generator=generator)
        halves = (found[:, order[first : first + count]].mean(1).clamp(min=0) for first in (0, count))
        total += rank_correlation(*halves)
    return total / DRAWS


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("losses", type=Path, help="of a search by `sensitivity`: PLAN.losses")
    found = increases(parser.parse_args().losses)
    heads, _, sequences = found.shape
    counts = " | ".join(f"{count} sequences" for count in SEQUENCES)
    print(f"| shrunk to | of {heads} heads, above two standard errors | {counts} |")
    print("|---" * (len(SEQUENCES) + 2) + "|")
    for name, own in zip(SIZES, found.unbind(1), strict=True):
        clear = int((own.mean(1) > 2 * own.std(1) / sequences**0.5).sum())
        print(f"| {name} | {clear} | {' | '.join(f'{agreement(own, count):.2f}' for count in SEQUENCES)} |")


if __name__ == "__main__":
    main()
