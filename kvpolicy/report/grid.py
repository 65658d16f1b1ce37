"""A table for any terminal: columns that do not fit beside each other go on below, behind the first one again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_LEAST_WORDS = 24  # characters that a column of prose needs
_MOST_NAME = 0.5  # of the width, for the first column
_BETWEEN = 2  # characters


class Grid:
    """A rich renderable. Cells of figures stay on one line, prose is broken into lines and takes what width there is.

    columns:  their headings; the first one names the rows
    rows:     a text for each column
    words:    headings of columns that hold prose
    optional: headings of columns that are left out where not all of them fit, the last one first
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str | Text]],
        *,
        title: str = "",
        words: Collection[str] = (),
        optional: Collection[str] = (),
    ) -> None:
        self._columns, self._title = tuple(columns), title
        self._rows = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
        self._words, self._optional = frozenset(words), frozenset(optional)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._title:
            yield Text(self._title, style="bold")
        fits = partial(self._fits, options.max_width)
        for block in self._blocks(fits):
            whole: set[int] = set()  # headings on one line, as far as there is room
            for column in block:
                whole |= {column} if fits(block, {*whole, column}) else set()
            yield self._table(block, whole, options.max_width)
            yield Text()

    def _blocks(self, fits: Callable[[list[int]], bool]) -> list[list[int]]:
        """The columns that stand beside each other, by their numbers."""
        rest = list(range(1, len(self._columns)))
        while not fits([0, *rest]) and (spare := [x for x in rest if self._columns[x] in self._optional]):
            rest.remove(spare[-1])
        blocks = [[0]]
        for column in rest:
            if len(blocks[-1]) > 1 and not fits([*blocks[-1], column]):
                blocks.append([0])
            blocks[-1].append(column)
        return blocks

    def _fits(self, width: int, block: list[int], whole: Collection[int] = frozenset()) -> bool:
        return sum(self._needed(column, whole, width) + _BETWEEN for column in block) - _BETWEEN <= width

    def _needed(self, column: int, whole: Collection[int], width: int) -> int:
        """The least characters of a column. whole: the columns whose headings are on one line"""
        heading = self._columns[column]
        longest = max((cell_len(line) for row in self._rows for line in row[column].plain.split("\n")), default=0)
        if heading in self._words:
            longest = min(longest, _LEAST_WORDS)
        needed = max(longest, *map(cell_len, [heading] if column in whole else heading.split()), 1)
        return needed if column else min(needed, max(8, int(_MOST_NAME * width)))

    def _table(self, block: Sequence[int], whole: Collection[int], width: int) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for column in block:
            heading, needed = self._columns[column], self._needed(column, whole, width)
            if heading in self._words:
                table.add_column(heading, min_width=needed, overflow="fold")
            elif column == 0:
                table.add_column(heading, width=needed, overflow="fold")
            else:
                prose = _is_prose(row[column].plain for row in self._rows)
                table.add_column(heading, width=needed, justify="left" if prose else "right")
        for row in self._rows:
            table.add_row(*(row[column] for column in block))
        return table


def _is_prose(cells: Iterable[str]) -> bool:
    """Whether a column reads from the left: most of its cells begin with a letter."""
    texts = [cell.strip() for cell in cells if cell.strip()]
    return sum(text[0].isalpha() for text in texts) * 2 > len(texts)
