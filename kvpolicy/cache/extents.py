"""Who owns which rows of an arena that sequences join and leave."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Extents:
    """Rows from `first` to `last`, in pieces that do not overlap.

    owned: the first row and the number of rows, of each owner
    """

    first: int
    last: int
    owned: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_free(self) -> int:
        """Rows that nobody owns, wherever they are."""
        return self.last - self.first - sum(size for _, size in self.owned.values())

    def gap(self, size: int) -> int | None:
        """The first row of the first gap that holds `size` rows, or None."""
        begin = self.first
        for start, taken in sorted(self.owned.values()):
            if start - begin >= size:
                return begin
            begin = start + taken
        return begin if self.last - begin >= size else None

    def take(self, owner: int, size: int) -> int:
        """Gives an owner the first gap of this size. Returns its first row; raises `ValueError` where there is none."""
        start = self.gap(size)
        if start is None:
            raise ValueError(f"no gap of {size} rows: {self.num_free} are free in all")
        self.owned[owner] = start, size
        return start

    def release(self, owner: int) -> None:
        """Gives the rows of an owner back."""
        del self.owned[owner]

    def pack(self) -> list[tuple[int, int, int, int]]:
        """Closes all gaps. Returns (owner, from row, to row, rows) of each piece that moves, in the order to do it."""
        moves, begin = [], self.first
        for owner, (start, size) in sorted(self.owned.items(), key=lambda item: item[1]):
            if start != begin:
                moves.append((owner, start, begin, size))
                self.owned[owner] = begin, size
            begin += size
        return moves
