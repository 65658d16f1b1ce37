"""The random game with entries of 8 or 4 bits: what is held is codes, bit by bit, and what is read is decoded."""

import torch
from kvpolicy_kernels.formats import EntryFormat, rounded
from kvpolicy_kernels.key_centre import KeyCentre

from tests.cache.game import Game
from tests.cache.game_policies import Window
from tests.cache.naive import Naive


class NaiveEncoded(Naive):
    """A token that is held is read as its codes say, unless it is a sink, or none has settled `exact_recent` behind it.

    exact: of each row, what is read as it came
    """

    def __init__(self, entry_format, key_centres, *arguments, **options):
        super().__init__(*arguments, **options)
        self.format, self.centres = entry_format, key_centres
        self.recent_window = max(self.recent_window, entry_format.exact_recent)
        for row in self.rows:
            row.exact = {}
        self.decoded_values = rounded(self.value, entry_format)

    def entries(self, row, layer, head, positions):
        exact = super().entries(row, layer, head, positions)
        tokens = [row.tokens[p] for p in positions]
        centre = self.centres and self.centres[layer].of(torch.tensor(head), torch.tensor(positions, dtype=int))
        coded = rounded(self.key[layer, tokens, head], self.format, centre), self.decoded_values[layer, tokens, head]
        is_exact = torch.tensor([self.is_exact(row, p) for p in positions], dtype=torch.bool)
        return [torch.where(is_exact[:, None], *pair) for pair in zip(exact, coded, strict=True)]

    def is_exact(self, row, position):
        return position in row.exact.values()

    def forward(self, columns, hold=0):
        before = [row.settled for row in self.rows]
        out = super().forward(columns, hold)
        for row, count in zip(self.rows, before, strict=True):
            self.settle(row, count)
        return out

    def look(self, row, fresh, pending):
        if fresh[-1] is not None and fresh[-1] in row.kept[0][0]:  # a decoded token, which was written first
            self.settle(row, fresh[-1])
        return super().look(row, fresh, pending)

    def settle(self, row, before):
        """Tokens from `before` on have settled: each takes the place of the one `exact_recent` before it."""
        recent, sinks = self.format.exact_recent, self.policy.num_sink_tokens
        for p in range(before, row.settled if recent else 0):
            row.exact[p if p < sinks else (p % recent, "recent")] = p

    def crop(self, count):
        super().crop(count)
        for row in self.rows:
            row.exact = {place: p for place, p in row.exact.items() if p < row.settled}


class EncodedGame(Game):
    dims, slack = ((16, 16), (16, 64)), 10  # the largest logits are large, and a rotation rounds

    @property
    def entry_format(self):
        return self.own_format

    @property
    def least(self):
        recent = self.own_format.exact_recent
        return max(super().least, recent and self.policy.num_sink_tokens + recent)

    def _policy(self):
        policy = super()._policy()
        # what a policy reads of rotated rows is a sum, whose last bits depend on how many rows there are
        rotated = isinstance(policy, Window) and self.random.random() < 0.8
        bits, recent = self.random.choice((4, 4, 8)), self.random.choice((0, 2, 5))
        self.own_format = EntryFormat(bits, rotated=rotated, centred=self.random.random() < 0.7, exact_recent=recent)
        self.centres = None
        return policy

    @property
    def key_centres(self):
        """Waves of quarter turns, 0, 1 and -1: beside so large a constant their sums are exact numbers of eighths."""
        if self.centres is None and self.own_format.centred:
            heads, dim = self.all_heads if self.heads is None else self.heads[1], self.spec.attention.key_dim
            self.centres = []
            for _ in range(self.layers):
                own = torch.randint(-32, 33, (5, heads, dim), generator=self.torch) / 8
                own[0] += 64 * own[0].sign() + 64 * (own[0] == 0)
                turns = torch.tensor([2**30, -(2**30), -(2**31)], dtype=torch.int32)
                chosen = torch.randint(0, 3, (heads, 2), generator=self.torch)
                self.centres.append(KeyCentre(own.float(), turns[chosen]))
        return self.centres

    def beside(self, **options):
        for x in self.data[1:]:
            x[..., 3] *= 6  # a channel that stands out
            x.mul_(8).round_().div_(8)  # whose rotations are exact, however many rows are rotated at once
        return NaiveEncoded(
            self.own_format, self.key_centres, self.policy, self._schedule(), self.data, self.batch, **options
        )

    def check_entries(self, layer, arena, rows, keys, values, heads, positions):
        if self.key_centres is not None:
            keys = keys - self.key_centres[layer].of(heads, positions)
        for name, expected in (("key", keys), ("value", values)):
            once = self.own_format.encode(expected)
            assert torch.equal(getattr(arena, f"{name}s")[rows], once.codes)
            assert torch.equal(getattr(arena, f"{name}_scales")[rows], once.scales)

    def check_bytes(self):
        store, rows = self.store, self.naive.rows
        attention, own, heads = self.spec.attention, self.own_format, self.naive.num_heads
        dims = attention.key_dim, attention.value_dim
        entry = sum(own.row_bytes(dim) for dim in dims)
        slots = own.exact_recent and self.policy.num_sink_tokens + own.exact_recent
        block = self.layers * len(rows) * slots * (heads * sum(dims) * 4 + 4)
        pending = sum(heads * len(row.pending) for row in rows) * self.layers
        inside = [len(kept) for row in rows for layer in row.kept for kept in layer]
        room = sum(n + max(64, n // 32) for n in inside)
        tables = 8 * (8 * len(inside) + (5 + len(store.layers)) * len(rows) * self.layers * 4)
        tables += 8 * 3 * len(rows) * self.layers * self.all_heads + 8 * pending
        held = int(store.lengths.sum()) - pending
        assert held * entry + block <= store.nbytes
        assert store.nbytes <= room * (entry + 8) + pending * (sum(dims) * 4 + 8) + block + tables
