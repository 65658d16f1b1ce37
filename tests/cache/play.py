"""A store beside the oracle of each of its rows: fed the same tokens, compared after every step."""

import copy

import torch

from kvpolicy import LayerSpec, ModelSpec
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import Scoring
from tests.cache.oracle import Row

GROUP, KEY_DIM, VALUE_DIM = 3, 8, 6
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def spec_of(layers=1, heads=2, **layer):
    full = LayerSpec("full", heads * GROUP, heads, KEY_DIM, VALUE_DIM, **layer)
    return ModelSpec("test", 32, 97, 4096, "", (full,) * layers)


def tensors(length, batch=1, heads=2, seed=0):
    """(query, key, value) of whole sequences, [batch, heads, length, dim]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads * GROUP, KEY_DIM), (heads, KEY_DIM), (heads, VALUE_DIM))
    return tuple(torch.randn(batch, n, length, dim, generator=generator) for n, dim in shapes)


def store_of(policy, table, **options):
    """A store under a fixed table [H] or [L, H]."""
    table = torch.tensor(table)
    table = table[None] if table.dim() == 1 else table
    return RaggedStore(spec_of(*table.shape), Fixed(table), policy, **options)


def poison(store):
    """Fills the rows that no segment uses: whoever reads one, sees it."""
    for held in store.layers:
        if held is None:
            continue
        unused = torch.ones(len(held.arena.keys), dtype=torch.bool)
        rows = held.arena.padded_rows()
        unused[rows[rows >= 0]] = False
        for name in ("keys", "values", "scores"):
            if (tensor := getattr(held.arena, name)) is not None:
                tensor[unused] = float("nan")
        held.arena.positions[unused] = -99


class History:
    """The capacities of a row, which go on from those before; of a row that is taken twice, each has its own."""

    def __init__(self, schedule, held=()):
        self.schedule, self.held = schedule, [*held]

    def __call__(self, seen):
        if not self.held or seen > self.held[-1][0]:
            self.held.append((seen, self.schedule.at(seen, self.held[-1][1] if self.held else None)))
        return self.held[-1][1][0].tolist()

    def __deepcopy__(self, memo):
        return History(self.schedule, self.held)


class Play:
    """table: entries of each head, or a schedule of one layer; lengths: tokens of each row's own data."""

    def __init__(self, policy, table, batch=1, tokens=64, spans=(), decode="evict", seed=0, options=None, **spec):
        schedule = Fixed(torch.tensor([table])) if isinstance(table, list) else table
        self.heads = schedule.shape[1]
        self.store = RaggedStore(
            spec_of(1, self.heads, **spec), schedule, policy, batch_size=batch, protected=spans, decode=decode
        )
        self.scoring = Scoring(**(options or {}))
        self.data = tensors(tokens, batch, self.heads, seed)
        self.rows = [self._row(self.store.schedule, row, decode) for row in range(batch)]

    def _row(self, schedule, index, decode):
        data = (x[index] for x in self.data)
        spans = self.store.protection.spans
        return Row(self.store.policy, *data, History(schedule), spans, decode == "append", self.scoring.options())

    def prompt(self, *counts, hold=0, valid=None):
        """One forward of `counts[b]` tokens for each row, padded on the left, or where `valid` [B, n] is False."""
        counts = counts * len(self.rows) if len(counts) == 1 else counts
        n = max(counts)
        if valid is None:
            valid = torch.arange(n)[None] >= n - torch.tensor(counts)[:, None]
        steps = torch.tensor([row.seen for row in self.rows])[:, None] + valid.cumsum(1) - 1
        query, key, value = (self._gather(x, steps, valid) for x in self.data)
        chunk = self.store.arrive(0, key, value, None if bool(valid.all()) else valid)
        out = self.store.attend_chunk(0, query, chunk, self.scoring)
        self.store.keep(0, query, chunk, self.scoring, hold=hold)
        for index, row in enumerate(self.rows):
            expected = row.prompt(counts[index], hold)
            torch.testing.assert_close(out[index][:, valid[index]], expected, **TOLERANCE)
        return self.check()

    def _gather(self, x, steps, valid):
        """[B, heads, n, dim], large numbers at padding."""
        index = steps.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index).masked_fill(~valid[:, None, :, None], 1e3)

    def decode(self, times=1):
        for _ in range(times):
            steps = torch.tensor([[row.seen] for row in self.rows])
            query, key, value = (self._gather(x, steps, torch.ones_like(steps, dtype=torch.bool)) for x in self.data)
            self.store.append(0, key, value)
            out = self.store.attend_newest(0, query, self.scoring)
            for index, row in enumerate(self.rows):
                torch.testing.assert_close(out[index], row.decode(), **TOLERANCE)
            self.check()
        return self

    def crop(self, count):
        self.store.crop(count)
        for row in self.rows:
            row.crop(count)
        return self.check()

    def take(self, *rows):
        self.store.take(torch.tensor(rows))
        self.data = tuple(x[list(rows)] for x in self.data)
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]
        return self.check()

    def check(self):
        """Each segment holds the oracle's tokens, bit for bit, within its capacity and its slack."""
        poison(self.store)
        arena, positions = self.store.layers[0].arena, self.store.positions(0)
        lengths, capacities = self.store.lengths[0], self.store.capacities[0]
        assert self.store.seen.tolist() == [row.seen for row in self.rows]
        for segment, held in enumerate(positions):
            index, head = divmod(segment, self.heads)
            row, start = self.rows[index], int(arena.start[segment])
            assert sorted(held.tolist()) == sorted(row.kept[head])
            assert {p for p in range(row.settled) if row.is_protected(p)} <= set(held.tolist())
            assert int(capacities[index, head]) == row.capacity(head)
            assert int(lengths[index, head]) == len(row.kept[head]) + len(row.pending)
            if self.store.decode_mode == "evict":
                assert len(held) <= row.capacity(head)
                most, capacity = int(room(len(held))), row.capacity(head) + row.spanned_to_come
                # a segment whose capacity grows has room beyond it, and moves the less often
                most = max(most, capacity) if self.store.schedule.grows else max(len(held), min(capacity, most))
                assert int(arena.allocated[segment]) <= most
            assert torch.equal(arena.keys[start : start + len(held)], row.key[head, held])
            assert torch.equal(arena.values[start : start + len(held)], row.value[head, held])
        return self


def room(length):
    """Rows that a segment of this length may own; int, or int tensor."""
    length = torch.as_tensor(length)
    return length + (length // 32).clamp(min=64)
