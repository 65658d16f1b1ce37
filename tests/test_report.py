"""Reports: the numbers they show, what they escape, and pictures that are pictures."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from kvpolicy.budget.plan import BudgetPlan, PlanChoice, PlanLevel, PlanMethod, PlanModel, kept_fractions
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.model.spec import Importance, ModelSpec
from kvpolicy.report import heatmap, html, numbers, tables, terminal_heatmap

HOSTILE = "<script>alert('x')</script> [bold]$\\frac$ & \"quoted\""


def make_plan(
    layers: int = 30, heads: int = 3, retentions: tuple[float, ...] = (0.5, 0.1), name: str = "me/m"
) -> BudgetPlan:
    spec = ModelSpec("mine", 64, 100, 4096, "{}", (LayerSpec("full", heads, heads, 64, 64),) * layers)
    weights = torch.randn(layers, heads, generator=torch.Generator().manual_seed(0)).exp()
    measured = {"search": 14.0, "heldout": 15.0, "heldout_full": 13.0, "heldout_uniform": 17.0}
    compared = {"verdict": "better than uniform", "interval": [-0.2, -0.1]}
    levels = tuple(PlanLevel(r, kept_fractions(weights, r), {"exponent": 1.5}, measured, compared) for r in retentions)
    return BudgetPlan(
        PlanModel.from_spec(spec, name),
        PlanMethod(PlanChoice("cosine"), PlanChoice("baklava"), PlanChoice("streaming", {"num_sink_tokens": 4})),
        Importance(weights),
        levels,
        {"context_length": 2048, "note": name, "versions": {"torch": "2"}},
    )


def bare_plan() -> BudgetPlan:
    spec = ModelSpec("mine", 64, 100, 4096, "{}", (LayerSpec("full", 2, 2, 64, 64),) * 2)
    return BudgetPlan.from_capacities(spec, [[5, 100], [200, 40]], 1000)


def printed(item: object, width: int = 120, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(item)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_relative_budgets_have_mean_one() -> None:
    for level in make_plan().levels:
        assert float(numbers.relative_budgets(level).mean()) == pytest.approx(1.0)


def test_bytes_and_excess() -> None:
    plan = make_plan()
    assert numbers.bytes_per_token(plan, 1.0) == 30 * 3 * 2 * 64 * 2
    assert numbers.excess(plan.levels[0]) == "50 %"
    assert numbers.excess(bare_plan().levels[0]) == ""
    assert [numbers.size(x) for x in (0, 999, 1536, 3e12)] == ["0 B", "999 B", "1.54 kB", "3.00 TB"]


def test_levels_are_listed_from_the_smallest() -> None:
    shown = printed(tables.levels_table(make_plan()), width=200)
    assert shown.index("10 %") < shown.index("50 %")
    for part in ("15.000", "17.000", "13.000", "better than uniform", "-0.2000 to -0.1000"):
        assert part in shown


def test_the_levels_fit_a_terminal_of_80_columns() -> None:
    assert "…" not in printed(tables.levels_table(make_plan()), width=80)


def test_a_bare_plan_shows_no_empty_columns() -> None:
    shown = printed(tables.levels_table(bare_plan()))
    assert "perplexity" not in shown
    assert "8.625 %" in shown
    assert "none" in printed(tables.summary_table(bare_plan()))


def test_names_are_not_markup() -> None:
    assert "[bold]" in printed(tables.summary_table(make_plan(name=HOSTILE)), width=200)


@pytest.mark.parametrize("colour", [False, True])
def test_the_terminal_map_reads_without_colour(colour: bool) -> None:
    plan = bare_plan()
    shown = printed(terminal_heatmap.budget_heatmap(plan, plan.levels[0]), colour=colour)
    assert ("\x1b[" in shown) is colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert plain[1].split() == ["layer", "0", "1"]
    assert [line.split() for line in plain[2:4]] == [["0", "0.06", "1.16"], ["1", "2.32", "0.46"]]
    assert plain[1].index("1") < plain[2].index("1.16") + 4


def test_a_wide_map_is_broken_to_fit() -> None:
    shown = printed(terminal_heatmap.importance_heatmap(torch.rand(2, 40), [3, 17]), width=60)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 60
    heads = [number for line in lines if line.startswith("layer") for number in line.split()[1:]]
    assert heads == [str(head) for head in range(40)]


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.004, 0.5, 9.99, 123.4, 99999.0, 1e12, 5e-324])
def test_cells_keep_their_width(value: float) -> None:
    shown = printed(terminal_heatmap.importance_heatmap(torch.tensor([[value, 1.0]]), [0]))
    assert len(shown.splitlines()[2].rstrip()) <= 5 + 12


@pytest.mark.parametrize("shape", [(1, 1), (30, 3), (32, 8), (80, 8)])
def test_the_picture_is_drawn_for_every_shape(shape: tuple[int, int]) -> None:
    png = heatmap.plan_png(make_plan(*shape, retentions=(0.3,)))
    image = imread(io.BytesIO(png))
    assert png.startswith(b"\x89PNG")
    assert image.shape[0] > 200
    assert len({tuple(pixel) for pixel in image.reshape(-1, 4)[::97].tolist()}) > 3
    assert heatmap.plan_png(make_plan(*shape, retentions=(0.3,))) == png


def test_more_levels_make_a_larger_picture() -> None:
    one, many = (imread(io.BytesIO(heatmap.plan_png(make_plan(4, 2, r)))) for r in ((0.3,), (0.1, 0.2, 0.3, 0.4, 0.5)))
    assert many.shape[0] > one.shape[0]
    assert many.shape[1] > one.shape[1]


def test_odd_values_are_drawn() -> None:
    assert heatmap.plan_png(bare_plan())
    assert heatmap.importance_png(torch.zeros(2, 2), [0, 5], "nothing matters")
    assert heatmap.plan_png(make_plan(2, 2, name=HOSTILE * 3))


class Tags(HTMLParser):
    """Collects the tags and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_whole_escaped_and_alone() -> None:
    text = html.plan_html(make_plan(name=HOSTILE))
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names
    assert not any(tag in ("link", "iframe") for tag in names)
    assert "&lt;script&gt;" in text
    assert "img" not in names, "maps are made of cells"
    said = [attrs["title"] or "" for tag, attrs in tags.seen if tag == "td" and "title" in attrs]
    assert len(said) == 3 * 30 * 3, "importance and two levels"
    assert "layer 29, KV head 2: " in said[-1] and said[-1].endswith("times uniform")
    for part in ("15.000", "exponent = 1.5", "2048", "num_sink_tokens=4", ">29</td>"):
        assert part in text


def test_html_of_a_bare_plan() -> None:
    tags = Tags()
    tags.feed(html.plan_html(bare_plan()))
    assert tags.open == []


def test_tables_do_not_load_matplotlib() -> None:
    code = (
        "import sys, kvpolicy, kvpolicy.report.tables, kvpolicy.report.terminal_heatmap, kvpolicy.report.html\n"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
