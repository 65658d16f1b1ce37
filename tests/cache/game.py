"""A random sequence of operations on a `RaggedStore` beside the naive model, which must agree after each of them."""

import copy
import os
import random

import pytest
import torch

from kvpolicy import BudgetError, LayerSpec, ModelSpec
from kvpolicy.budget.ask import Ask
from kvpolicy.cache import RaggedStore, store_decoding
from kvpolicy.cache.schedule import Fixed, Growing
from kvpolicy.cache.scoring import Scoring
from kvpolicy.cache.state import Tensors, pack, unpack
from kvpolicy.files.fields import Fields
from tests.cache.game_policies import Digest, Fading, Keyed, Window
from tests.cache.naive import Naive, Schedule

POOL = 240


def sequences(default):
    """How many random sequences a test plays: KVPOLICY_SEQUENCES of them, counted from KVPOLICY_SEED on."""
    first = int(os.environ.get("KVPOLICY_SEED", "0"))
    return range(first, first + int(os.environ.get("KVPOLICY_SEQUENCES", default)))


def poison(store):
    """Rows that no segment uses: NaN, or large numbers where a policy reads what a row holds."""
    reads = {"keys", "values"} & store.policy.requires
    for held in store.layers:
        if held is None:
            continue
        free = torch.ones(len(held.arena.keys), dtype=torch.bool)
        for start, length in zip(held.arena.start.tolist(), held.arena.length.tolist(), strict=True):
            free[start : start + length] = False
        for name in held.arena.columns:
            column = getattr(held.arena, name)
            if not column.is_floating_point():
                column[free] = 0x5A5A
            else:
                is_read = name.removesuffix("_scales").rstrip("s") + "s" in reads
                column[free] = 3e4 if is_read else torch.nan


class Game:
    """seed: of everything, what is played and what it is played with."""

    dims, slack = ((8, 8), (8, 6)), 1

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        pick = self.random
        self.layers, self.all_heads, self.group = pick.randint(1, 3), pick.randint(1, 3), pick.randint(1, 2)
        self.heads = None
        if self.all_heads > 1 and pick.random() < 0.2:  # a tensor-parallel rank
            first = pick.randrange(self.all_heads)
            self.heads = (first, pick.randint(1, self.all_heads - first))
        self.append = pick.random() < 0.15
        self.policy = self._policy()
        begins = pick.sample(range(26), pick.choice((0, 0, 1, 2)))
        self.spans = [(begin, begin + pick.randint(1, 6)) for begin in begins]
        self.interval = pick.choice((3, 8, 64))
        self.options = pick.choice(({}, {}, {"scale": 0.4}, {"softcap": 2.0}, {"sinks": True}))
        self.spec = self._spec()
        self.table, self.shares = self._table()
        self.retention, self.min_tokens = pick.uniform(0.1, 0.9), pick.choice((1, 1, pick.randint(2, 12)))
        self.hold = pick.choice((0, 0, 0, 0, pick.randint(1, 7)))
        self.batch = pick.choice((1, 2, 2, 3))
        self.used = 0
        count = self.all_heads if self.heads is None else self.heads[1]
        attention = self.spec.attention
        shapes = ((count * self.group, attention.key_dim), (count, attention.key_dim), (count, attention.value_dim))
        self.data = tuple(torch.randn(self.layers, POOL, n, dim, generator=self.torch) for n, dim in shapes)
        sink_logits = torch.randn(count * self.group, generator=self.torch) if self.options.get("sinks") else None
        self.scoring = Scoring(self.options.get("scale"), self.options.get("softcap"), sink_logits)
        self.store = self.empty(self.batch)
        self.naive = self.beside(
            first_head=0 if self.heads is None else self.heads[0],
            spans=self.spans,
            append=self.append,
            interval=self.interval,
            options=self.scoring.options(),
        )
        self.forks = []

    def beside(self, **options):
        return Naive(self.policy, self._schedule(), self.data, self.batch, **options)

    @property
    def least(self):
        """Entries of a KV head."""
        return self.policy.num_sink_tokens + 1

    @property
    def entry_format(self):
        return None

    @property
    def key_centres(self):
        return None

    def _policy(self):
        sinks, recent = self.random.randint(0, 4), self.random.choice((0, 0, self.random.randint(1, 6)))
        kind = self.random.choice((Window, Digest, Keyed, Fading))
        return kind(sinks) if kind is Window else kind(sinks, recent)

    def _spec(self):
        key_dim, value_dim = self.random.choice(self.dims)
        softcap, sinks = self.options.get("softcap"), bool(self.options.get("sinks"))
        layer = LayerSpec(
            "full", self.all_heads * self.group, self.all_heads, key_dim, value_dim, softcap=softcap, sinks=sinks
        )
        return ModelSpec("game", 32, 97, 4096, "", (layer,) * self.layers)

    def _table(self):
        """Capacities for a fixed budget, or None and shares for a growing one."""
        pick, shape = self.random, (self.layers, self.all_heads)
        low = self.least
        most = low + pick.choice((0, 4, 20))
        table = [[pick.randint(low, most) for _ in range(shape[1])] for _ in range(shape[0])]
        shares = [
            [pick.choice((0.0, 1.0, *(pick.random() for _ in range(6)))) for _ in range(shape[1])]
            for _ in range(shape[0])
        ]
        return (table, None) if pick.random() < 0.5 else (None, shares)

    def _schedule(self):
        if self.table is not None:
            return Schedule(self.table)
        return Schedule(retention=self.retention, shares=self.shares, min_tokens=self.min_tokens, floor=self.least)

    def empty(self, batch):
        shape = (self.layers, self.all_heads)
        if self.table is not None:
            schedule = Fixed(torch.tensor(self.table))
        else:
            shares = torch.tensor(self.shares)
            schedule = Growing(shape, lambda kept, context: shares, Ask(self.retention, min_tokens=self.min_tokens), 1)
        return RaggedStore(
            self.spec,
            schedule,
            self.policy,
            batch_size=batch,
            protected=self.spans,
            decode="append" if self.append else "evict",
            heads=self.heads,
            entry_format=self.entry_format,
            key_centres=self.key_centres,
        )

    # --- playing

    def play(self, monkeypatch, steps):
        monkeypatch.setattr(store_decoding, "GROWTH_INTERVAL", self.interval)
        self.prompt(self.random.randint(1, 24))
        moves = [self.prompt] * 3 + [self.decode] * 4 + [self.crop, self.take, self.fork, self.reload]
        for _ in range(steps):
            self.random.choice(moves)()
        for store, naive in self.forks:
            self.store, self.naive = store, naive
            self.check()

    def prompt(self, count=0):
        """A chunk, padded on the left; as a caller of `prefill` where that allows it."""
        pick = self.random
        count = count or pick.choice((1, 2, pick.randint(3, 12)))
        if not self.room(count):
            return
        started = [bool(row.tokens) for row in self.naive.rows]
        free = pick.random() < 0.5 or self.hold > 0  # the parts of a store take padding anywhere
        padding = [0 if pick.random() < 0.5 or (begun and not free) else pick.randint(0, count) for begun in started]
        columns = [[None] * n + [self.draw() for _ in range(count - n)] for n in padding]
        self.feed(columns, padding, free)

    def feed(self, columns, padding, free):
        expected = self.naive.forward(columns, self.hold)
        valid = torch.tensor([[token is not None for token in row] for row in columns])
        poison(self.store)
        for layer in range(self.layers):
            query, key, value = (x[layer] for x in self.gathered(columns))
            if free:
                chunk = self.store.arrive(layer, key, value, None if bool(valid.all()) else valid)
                out = self.store.attend_chunk(layer, query, chunk, self.scoring)
                self.store.keep(layer, query, chunk, self.scoring, hold=self.hold)
            else:
                num_padding = padding if any(padding) else self.random.choice((None, padding, torch.tensor(padding)))
                out = self.store.prefill(layer, query, key, value, num_padding, **self.call_options())
            for row in range(len(columns)):
                close(out[row][:, valid[row]], expected[layer, row][:, valid[row]], self.slack)
        self.check()

    def decode(self):
        rows = self.naive.rows
        if not all(row.tokens for row in rows) or rows[0].pending:
            return  # a row without a token, or tokens that may be taken back, take a prompt's way
        for _ in range(self.random.choice((1, 2, 7))):
            if not self.room(1):
                break
            tokens = [self.draw() for _ in rows]
            expected = self.naive.decode(tokens)
            poison(self.store)
            states = self.gathered([[token] for token in tokens])
            for layer in range(self.layers):
                out = self.store.decode(layer, *(x[layer] for x in states), **self.call_options())
                close(out, expected[layer], self.slack)
        self.check()

    def crop(self):
        count, possible = self.random.choice((0, 1, 2, 3, 5)), self.naive.possible()
        poison(self.store)
        if count > possible:
            with pytest.raises(BudgetError, match="cannot be taken back"):
                self.store.crop(count)
        else:
            self.naive.crop(count)
            self.store.crop(count)
        self.check()

    def take(self):
        rows = [self.random.randrange(len(self.naive.rows)) for _ in range(self.random.randint(1, 3))]
        poison(self.store)
        self.store.take(torch.tensor(rows))
        self.naive.rows = [copy.deepcopy(self.naive.rows[row]) for row in rows]
        self.check()

    def fork(self):
        """One goes on, the other stays as it is."""
        if len(self.forks) < 2:
            poison(self.store)
            self.forks.append((self.store, self.copied()))
            self.store = self.store.fork()
            if self.random.random() < 0.5:
                self.forks[-1], self.store = (self.store, self.forks[-1][1]), self.forks[-1][0]
            self.check()

    def copied(self):
        held = self.naive
        other = copy.copy(held)
        other.rows = copy.deepcopy(held.rows)
        return other

    def reload(self):
        """Away into tensors and JSON values, and back."""
        poison(self.store)
        tensors, meta = pack(self.store)
        store, given = self.empty(len(self.naive.rows)), Tensors({name: x.clone() for name, x in tensors.items()})
        unpack(store, given, Fields(meta, ""), torch.float32, [torch.device("cpu")] * self.layers)
        given.done()
        self.store = store
        self.check()

    # --- what is handed over

    def room(self, count):
        return self.used + count * len(self.naive.rows) <= POOL

    def draw(self):
        self.used += 1
        return self.used - 1

    def gathered(self, columns):
        """(query, key, value) of these tokens, [L, B, heads, n, dim]; large numbers at padding."""
        index = torch.tensor([[-1 if token is None else token for token in row] for row in columns])
        states = []
        for x in self.data:
            part = x[:, index.clamp(min=0)].masked_fill((index < 0)[None, :, :, None, None], 1e3)
            states.append(part.transpose(2, 3))
        return states

    def call_options(self):
        return {"scale": self.scoring.scale, "sink_logits": self.scoring.sink_logits}

    # --- what must agree

    def check(self):
        store, rows = self.store, self.naive.rows
        assert store.seen.tolist() == [len(row.tokens) for row in rows]
        lengths, capacities = store.lengths.tolist(), store.capacities.tolist()
        for layer in range(self.layers):
            arena, positions = store.layers[layer].arena, [held.tolist() for held in store.positions(layer)]
            places, tokens, heads, scores, at = [], [], [], [], []
            for segment, (held, start) in enumerate(zip(positions, arena.start.tolist(), strict=True)):
                index, head = divmod(segment, self.naive.num_heads)
                row, capacity = rows[index], self.naive.capacity(rows[index], layer, head)
                kept, pending = row.kept[layer][head], sum(p is not None for p in row.pending)
                assert sorted(held) == sorted(kept), (layer, index, head)
                assert lengths[layer][index][head] == len(kept) + pending
                assert capacities[layer][index][head] == capacity
                assert self.append or len(kept) <= capacity
                places += range(start, start + len(held))
                tokens += [row.tokens[p] for p in held]
                heads += [head] * len(held)
                at += held
                scores += [kept[p] for p in held]
            states = [x[layer, tokens, heads] for x in self.data[1:]]
            self.check_entries(
                layer, arena, places, *states, torch.tensor(heads, dtype=int), torch.tensor(at, dtype=int)
            )
            assert arena.scores is None or arena.scores[places].tolist() == scores
        self.check_bytes()

    def check_entries(self, layer, arena, rows, keys, values, heads, positions):
        assert torch.equal(arena.keys[rows], keys)
        assert torch.equal(arena.values[rows], values)

    def check_bytes(self):
        """No byte more than the entries, their room and the tables."""
        store, item = self.store, self.data[0].element_size()
        attention = self.spec.attention
        entry = (attention.key_dim + attention.value_dim) * item
        held = int(store.lengths.sum())
        pending = sum(self.naive.num_heads * len(row.pending) for row in self.naive.rows) * self.layers
        inside = [len(kept) for row in self.naive.rows for layer in row.kept for kept in layer]
        room = sum(n + max(64, n // 32) for n in inside)
        tables = 8 * (8 * len(inside) + (5 + len(store.layers)) * len(self.naive.rows) * self.layers * 4)
        tables += 8 * 3 * len(self.naive.rows) * self.layers * self.all_heads + 8 * pending
        assert held * entry <= store.nbytes + pending * entry
        assert store.nbytes <= (room + pending) * (entry + 8) + tables
        seen = sum(len(row.tokens) for row in self.naive.rows)
        assert store.dense_nbytes == seen * self.layers * self.naive.num_heads * entry


def close(found, expected, slack=1):
    """NaN is never close."""
    assert bool(((found.double() - expected).abs() <= slack * (2e-6 + 1e-5 * expected.abs())).all())
