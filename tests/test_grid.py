"""Tables of the terminal fit it, whatever its width, and lose nothing."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from kvpolicy.report.grid import Grid

COLUMNS = ["method", "perplexity", "above full", "of uniform's", "vs uniform", "bytes"]
ROWS = [
    ["full", "7.389", "", "", "", "11.89 MB"],
    ["expected_attention/uniform", "8.166", "+10.5% (+10.1% to +10.9%)", "100%", "", "3.50 MB"],
    ["snapkv/学习 shuffled", "9.025", "+22.1% (+21.9% to +22.4%)", "210%", "worse", "3.50 MB"],
]


def printed(grid: Grid, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(grid)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(width: int) -> None:
    lines = printed(Grid(COLUMNS, ROWS, title="50 % kept"), width)
    assert max(map(cell_len, lines)) <= width
    assert not any("…" in line for line in lines)
    for cell in ("7.389", "+22.1% (+21.9% to +22.4%)", "210%", "3.50 MB", "worse"):
        assert any(cell in line for line in lines), cell


def test_columns_that_do_not_fit_go_on_below_behind_the_first() -> None:
    wide, narrow = (printed(Grid(COLUMNS, ROWS), width) for width in (200, 80))
    assert sum("method" in line for line in wide) == 1
    assert sum("method" in line for line in narrow) == 2
    assert sum(line.startswith("full") for line in narrow) == 2
    assert max(map(len, wide)) > 80, "and a wide terminal is used"


def test_optional_columns_are_left_out_before_a_second_block_begins() -> None:
    def heads(width: int) -> str:
        return printed(Grid(COLUMNS, ROWS, optional=["of uniform's", "vs uniform"]), width)[0]

    assert "of uniform's" in heads(200) and "vs uniform" in heads(200)
    assert not {"of uniform's", "vs uniform"} & {name for name in COLUMNS if name in heads(80)}
    assert "bytes" in heads(80)


def test_prose_is_broken_into_lines_and_takes_the_width_there_is() -> None:
    prose = "Keep what the model looks at when it repeats its context, and nothing else at all."
    narrow, wide = (printed(Grid(["name", "about"], [["kvzip", prose]], words=["about"]), width) for width in (50, 200))
    assert len(narrow) > len(wide)
    assert max(map(len, narrow)) <= 50
    assert any(prose in line for line in wide)


def test_markup_in_a_cell_is_text() -> None:
    assert any("[red]x[/no]" in line for line in printed(Grid(["a"], [["[red]x[/no]"], [Text("y")]]), 80))


def test_a_long_path_in_prose_is_broken_and_keeps_its_place() -> None:
    lines = printed(Grid(["what", "is", "found"], [["copy", "ok", "/root" * 30]], words=["found"]), 80)
    assert max(map(len, lines)) <= 80 and sum("what" in line for line in lines) == 1
    assert "/root" * 30 in "".join(line[10:].strip() for line in lines)
