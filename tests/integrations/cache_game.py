"""A random sequence of operations on the cache of a transformers model beside the naive model.

The model computes what it hands to its cache. What that keeps has to be what the naive model keeps, and the logits have
to be those of one dense forward in which each token sees, in each KV head, what the naive model let it see.
"""

import copy
import random

import torch
import transformers
from kvpolicy_baselines.streaming import StreamingPolicy

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, ModelSpec
from kvpolicy.budget.plan import PlanChoice
from kvpolicy.cache import store_decoding
from kvpolicy.cache.store import RaggedStore
from tests.cache.game import poison
from tests.cache.game_policies import Digest, Fading, Keyed, Window
from tests.cache.naive import Naive, Schedule
from tests.integrations.ragged_oracle import masked_logits
from tests.integrations.recording import record_on_cpu
from tests.tiny import attention_of, over, tiny_model

POOL = 200
MODELS = {}


def model_of(name):
    if name not in MODELS:
        MODELS[name] = tiny_model(name, attention=attention_of(name))
    return MODELS[name]


class Watched(Naive):
    """Notes which tokens each token sees. `sights[b][layer][head][position]` are positions."""

    def look(self, row, fresh, pending):
        row.sights = getattr(row, "sights", None) or [
            [[] for _ in range(self.num_heads)] for _ in range(self.num_layers)
        ]
        for column, position in enumerate(fresh):
            if position is None:
                continue
            chunk = [*pending, *(p for p in fresh[: column + 1] if p is not None)]
            for layer, heads in enumerate(row.kept):
                for head, kept in enumerate(heads):
                    row.sights[layer][head].append([*kept, *chunk])
        return torch.zeros(1)


class Recorder:
    """The keys and values that a store is handed: [[key, value] of each layer] of each forward."""

    def __init__(self, monkeypatch):
        self.forwards = []
        for name in ("arrive", "append"):
            monkeypatch.setattr(RaggedStore, name, self._around(getattr(RaggedStore, name)))

    def _around(self, method):
        def recording(store, layer, key, value, *rest):
            if layer == 0:
                self.forwards.append([])
            self.forwards[-1].append((key.clone(), value.clone()))
            return method(store, layer, key, value, *rest)

        return recording

    def taken(self):
        forwards, self.forwards = self.forwards, []
        return forwards


class CacheGame:
    """seed: of everything, what is played and what it is played with."""

    def __init__(self, seed, monkeypatch, folder):
        self.random, pick = random.Random(seed), random.Random(seed + 1)
        self.generator = torch.Generator().manual_seed(seed)
        name = pick.choice(("Llama", "Llama", "Qwen3", "Gemma2Window", "Gemma3n"))
        self.model = model_of(name)
        # 5.17 fails on its own cache when Gemma3n has recorded past its window; 5.23 does not
        release = tuple(map(int, transformers.__version__.split(".")[:2]))
        self.can_record = name != "Gemma3n" or release >= (5, 23)
        self.shared = random.Random(seed + 2).choice(({}, {1: 0}, {2: 0})) if name in ("Llama", "Qwen3") else {}
        self.spec, self.folder = ModelSpec.from_config(self.model.config).sharing(self.shared), folder
        self.has_windows = any(layer.kind != "full" for layer in self.spec.layers)
        sinks, recent = pick.randint(0, 4), pick.choice((0, 0, pick.randint(1, 6)))
        kinds = (lambda: Window(sinks), *(lambda kind=kind: kind(sinks, recent) for kind in (Digest, Keyed, Fading)))
        self.policy = pick.choice(kinds)()
        begins = pick.sample(range(26), pick.choice((0, 0, 1, 2)))
        self.spans = [(begin, begin + pick.randint(1, 6)) for begin in begins]
        append, self.interval, rollback = pick.random() < 0.15, pick.choice((3, 8, 64)), pick.randint(1, 7)
        options = {"protected": self.spans, "decode": "append" if append else "evict", "rollback": rollback}
        options["shared_layers"] = self.shared
        self.rollback, schedule = rollback, self._schedule(pick, options)
        real = StreamingPolicy(sinks) if isinstance(self.policy, Window) else self.policy
        self.cache = kvpolicy.new_cache(self.model, policy=real, **options)
        self.batch = pick.choice((1, 1, 2, 3))
        layers, heads, attention = self.spec.num_budgeted_layers, self.spec.num_kv_heads, self.spec.attention
        shape = (layers, POOL, heads)
        data = (
            torch.zeros(*shape, 1),
            torch.zeros(*shape, attention.key_dim),
            torch.zeros(*shape, attention.value_dim),
        )
        self.naive = Watched(
            self.policy, schedule, data, self.batch, spans=self.spans, append=append, interval=self.interval
        )
        self.ids = torch.randint(3, 97, (POOL,), generator=self.generator).tolist()
        self.used, self.hold, self.forks, self.columns, self.unfed = 0, 0, [], 0, None
        monkeypatch.setattr(store_decoding, "GROWTH_INTERVAL", self.interval)
        self.recorder = Recorder(monkeypatch)
        if pick.random() < 0.5:
            record_on_cpu(monkeypatch)

    def _schedule(self, pick, options):
        """The naive schedule; adds to `options` what gives a cache the same."""
        shape, low = self.spec.table_shape, self.policy.num_sink_tokens + 1
        if pick.random() < 0.5:
            most = low + pick.choice((0, 4, 20))
            table = [[pick.randint(low, most) for _ in range(shape[1])] for _ in range(shape[0])]
            kind = PlanChoice("streaming", {"num_sink_tokens": self.policy.num_sink_tokens})
            plan = BudgetPlan.from_capacities(self.spec, table, 64, policy=kind)
            options |= {"plan": plan, "context_length": 64}
            return Schedule(table)
        retention, min_tokens = round(pick.uniform(0.1, 0.9), 3), pick.choice((1, 1, pick.randint(2, 12)))
        options |= {"retention": retention, "min_tokens": min_tokens}
        shares = [[1.0] * shape[1] for _ in range(shape[0])]
        return Schedule(retention=retention, shares=shares, min_tokens=min_tokens, floor=low)

    # --- playing

    @torch.no_grad()
    def play(self, steps):
        self.prompt(self.random.randint(1, 24))
        moves = [self.prompt, self.prompt, self.decode, self.decode, self.turn]
        moves += [self.record, self.crop, self.reorder, self.fork, self.reload]
        for _ in range(steps):
            self.random.choice(moves)()
        for cache, naive, columns in self.forks:
            self.cache, self.naive, self.columns = cache, naive, columns
            self.check()

    def prompt(self, count=0):
        pick, rows = self.random, self.naive.rows
        count = count or pick.choice((1, 2, pick.randint(3, 14)))
        if not self.room(count):
            return
        padding = [0] * len(rows)
        if not self.columns and len(rows) > 1:  # a row of the first prompt may be shorter
            padding = [pick.choice((0, pick.randrange(count))) for _ in rows]
        self.feed([[None] * n + [self.draw() for _ in range(count - n)] for n in padding])

    def decode(self):
        for _ in range(self.random.choice((1, 2, 7))):
            if self.room(1):
                self.feed([[self.draw()] for _ in self.naive.rows])

    def feed(self, columns):
        """One forward of these tokens, None for padding."""
        new = torch.tensor([[token is not None for token in row] for row in columns])
        ids = torch.tensor([[0 if token is None else self.ids[token] for token in row] for row in columns])
        before = [self.columns - len(row.tokens) for row in self.naive.rows]
        past = torch.tensor([[False] * n + [True] * (self.columns - n) for n in before], dtype=torch.bool)
        mask = torch.cat([past.view(len(columns), self.columns), new], 1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, self.columns :]
        poison_cache(self.cache)
        logits = self.model(ids, attention_mask=mask, position_ids=positions, **over(self.cache)).logits
        self.unfed, self.cache.unfed = None, None
        (forward,) = self.recorder.taken()
        self.note(columns, forward)
        self.compare(logits, columns)
        self.check()

    def note(self, columns, forward):
        """Tells the naive model of one forward."""
        for layer, states in enumerate(forward):
            for into, state in zip((self.naive.key, self.naive.value), states, strict=True):
                for row, tokens in enumerate(columns):
                    for column, token in enumerate(tokens):
                        if token is not None:
                            into[layer, token] = state[row, :, column]
        rows = self.naive.rows
        tokens = [row[0] for row in columns]
        is_single = len(columns[0]) == 1 and None not in tokens and any(row.tokens for row in rows)
        if is_single and not self.hold and not rows[0].pending:
            self.naive.decode(tokens)
        else:
            self.naive.forward(columns, self.hold)
        self.columns += len(columns[0])

    def compare(self, logits, columns):
        """[B, n, vocabulary] against a dense forward of each row."""
        for index, row in enumerate(self.naive.rows):
            new = [column for column, token in enumerate(columns[index]) if token is not None]
            if new:
                ids = torch.tensor([[self.ids[token] for token in row.tokens]])
                expected = masked_logits(self.model, ids, self.visible(row), self.shared)[0, -len(new) :]
                torch.testing.assert_close(logits[index, new], expected, rtol=1e-4, atol=1e-4)

    def visible(self, row):
        """bool [L, H, T, T]."""
        total = len(row.tokens)
        visible = torch.zeros(self.naive.num_layers, self.naive.num_heads, total, total, dtype=torch.bool)
        for layer, heads in enumerate(row.sights):
            for head, sights in enumerate(heads):
                for position, sight in enumerate(sights):
                    visible[layer, head, position, sight] = True
        return visible

    def turn(self):
        """New tokens through `kvpolicy.generate`, which feeds what is left of the turn before, and decodes greedily."""
        rows, count, more = self.naive.rows, self.random.randint(1, 5), self.random.randint(1, 4)
        left = 0 if self.unfed is None else len(self.unfed[0])
        if self.hold or not self.room(count + more + 1):
            return
        padded = len({len(row.tokens) for row in rows}) > 1
        if padded and self.columns and any(self.columns < len(row.tokens) for row in rows):
            return
        columns = [[self.draw() for _ in range(count)] for _ in rows]
        ids = torch.tensor([[self.ids[token] for token in row] for row in columns])
        poison_cache(self.cache)
        out = kvpolicy.generate(
            self.model, self.cache, ids, max_new_tokens=more, min_new_tokens=more, do_sample=False, eos_token_id=None
        )
        made = out[:, count:].tolist()
        assert out[:, :count].tolist() == ids.tolist() and len(made[0]) == more
        fed = [[*(self.unfed[row] if left else []), *columns[row]] for row in range(len(rows))]
        for forward in self.recorder.taken():
            size = forward[0][0].shape[2]
            assert size == len(fed[0])
            self.note(fed, forward)
            for index, row in enumerate(rows):  # what was generated is what the dense forward finds likeliest
                text = torch.tensor([[self.ids[token] for token in row.tokens]])
                best = masked_logits(self.model, text, self.visible(row), self.shared)[0, -1]
                assert float(best.max() - best[made[index][0]]) < 1e-4
            fed = [[self.written(row.pop(0))] for row in made]
        self.unfed = fed
        assert not made[0]
        self.check()

    def written(self, id_):
        token = self.draw()
        self.ids[token] = id_
        return token

    def record(self):
        """Assisted generation begins or ends: the last tokens can be taken back. Or they are only kept on top."""
        if self.hold:
            self.cache.stop_recording()
            self.hold = 0
        elif self.columns and not self.has_windows and self.random.random() < 0.5:
            self.hold = self.random.randint(1, 9)
            self.cache.hold(self.hold)
        elif self.columns and self.can_record:
            self.cache.activate_past_recording()
            self.hold = self.rollback
        self.check()

    def crop(self):
        count, possible = self.random.randint(1, 5), self.naive.possible()
        if self.has_windows and (not self.hold or count > len(self.naive.rows[0].pending)):
            return  # sliding layers of transformers take back what they have recorded alone
        poison_cache(self.cache)
        if count > possible:
            before = self.columns
            try:
                self.cache.crop(-count)
            except BudgetError as error:
                assert "cannot be taken back" in str(error)
            else:
                raise AssertionError(f"{count} tokens were taken back, {possible} can be")
            assert self.cache.get_seq_length() == before
        else:
            self.cache.crop(-count)
            self.naive.crop(count)
            for row in self.naive.rows:
                row.sights = [[sights[: len(row.tokens)] for sights in heads] for heads in row.sights]
            self.columns -= count
            self.unfed, self.cache.unfed = None, None
        self.check()

    def reorder(self):
        """As beam search does, or other rows, or each row several times."""
        pick, rows = self.random, self.naive.rows
        how, size = pick.choice(("reorder", "select", "repeat")), len(rows)
        poison_cache(self.cache)
        if how == "repeat":
            times = pick.randint(1, 2) if size < 3 else 1
            chosen = [row for row in range(size) for _ in range(times)]
            self.cache.batch_repeat_interleave(times)
        else:
            chosen = [pick.randrange(size) for _ in range(size if how == "reorder" else pick.randint(1, 3))]
            method = self.cache.reorder_cache if how == "reorder" else self.cache.batch_select_indices
            method(torch.tensor(chosen))
        self.naive.rows = [copy.deepcopy(rows[row]) for row in chosen]
        self.unfed, self.cache.unfed = None, None
        self.check()

    def fork(self):
        """One goes on, the other stays as it is."""
        if len(self.forks) < 2:
            poison_cache(self.cache)
            other, naive = self.cache.fork(), copy.copy(self.naive)
            naive.rows = copy.deepcopy(self.naive.rows)
            pair = [self.cache, other]
            self.random.shuffle(pair)
            self.cache = pair[0]
            self.forks.append((pair[1], naive, self.columns))
            self.check()

    def reload(self):
        """Into a file and back; for a policy that a file can name."""
        if isinstance(self.policy, Window):
            poison_cache(self.cache)
            path = self.folder / "cache.kv"
            self.cache.save(path)
            self.cache = kvpolicy.load_cache(self.model, path, self.cache.recipe.plan)
            self.check()

    # --- what must agree

    def room(self, count):
        left = 0 if self.unfed is None else len(self.unfed[0])
        return self.used + (count + left) * len(self.naive.rows) <= POOL and self.columns + count < 60

    def draw(self):
        self.used += 1
        return self.used - 1

    def check(self):
        cache, rows, naive = self.cache, self.naive.rows, self.naive
        if cache.store is None:
            assert not self.columns
            return
        assert cache.get_seq_length() == self.columns
        assert cache.store.seen.tolist() == [len(row.tokens) for row in rows]
        lengths, capacities = cache.lengths.tolist(), cache.capacities.tolist()
        for layer in range(naive.num_layers):
            arena = cache.store.layers[layer].arena
            for segment, held in enumerate(cache.store.positions(layer)):
                index, head = divmod(segment, naive.num_heads)
                row, start, held = rows[index], int(arena.start[segment]), held.tolist()
                kept, capacity = row.kept[layer][head], naive.capacity(row, layer, head)
                assert sorted(held) == sorted(kept), (layer, index, head)
                assert lengths[layer][index][head] == len(kept) + sum(p is not None for p in row.pending)
                assert capacities[layer][index][head] == capacity
                assert naive.append or len(kept) <= capacity
                tokens = [row.tokens[p] for p in held]
                assert torch.equal(arena.keys[start : start + len(held)], naive.key[layer, tokens, head])
                assert torch.equal(arena.values[start : start + len(held)], naive.value[layer, tokens, head])
        entry = self.spec.entry_bytes(arena.keys.element_size())
        assert cache.nbytes >= int(cache.lengths.sum()) * entry
        report = cache.report()
        assert list(report.seen) == [len(row.tokens) for row in rows]
        assert list(report.entries) == cache.lengths.sum((0, 2)).tolist()


def poison_cache(cache):
    if cache.store is not None:
        poison(cache.store)
