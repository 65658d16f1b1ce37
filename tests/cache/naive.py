"""What a budget has to keep, written from the semantics of the design alone: plain lists, dictionaries and loops.

A sequence is a list of tokens; each KV head of each layer holds a dictionary from position to score. Nothing here looks
into `kvpolicy.cache`: `apportion`, which has laws and tests of its own, is taken as given.
"""

import torch

from kvpolicy import Budget, apportion


class Schedule:
    """How many entries each KV head may keep after n tokens: [L][H] numbers."""

    def __init__(self, table=None, *, retention=None, shares=None, min_tokens=None, floor=None):
        self.table, self.retention, self.shares = table, retention, shares
        self.min_tokens, self.floor = min_tokens, floor

    def at(self, seen, held):
        """held: what was allowed until now, None at first. A capacity never falls."""
        if self.table is not None:
            return self.table
        layers, heads = len(self.shares), len(self.shares[0])
        total = max(round(self.retention * seen * layers * heads), self.min_tokens * layers * heads)
        floor = self.floor if held is None else torch.tensor(held)
        budget = Budget(total, (layers, heads), floor, max(seen, self.min_tokens, self.floor))
        return apportion(torch.tensor(self.shares), budget).tolist()


class Sequence:
    """tokens: their numbers, in order;  pending: the last columns, which may be taken back: a position, or None for
    padding;  kept[layer][head]: {position: score};  evicted_at[layer]: tokens there were when something last left it
    """

    def __init__(self, layers, heads):
        self.tokens, self.pending = [], []
        self.kept = [[{} for _ in range(heads)] for _ in range(layers)]
        self.evicted_at = [0] * layers
        self.table, self.counted = None, 0

    @property
    def settled(self):
        """Tokens that cannot be taken back any more."""
        return len(self.tokens) - sum(p is not None for p in self.pending)


class Naive:
    """A batch of sequences under one budget.

    policy:   with `first(score, key, value, position)`, the score that a prompt gives an entry (score: what it had, 0
        for a new one), and `later(score, key, value, position)` after each decoded token, or None
    schedule: capacities;  first_head: of the KV heads held here
    data:     (query [L, N, Hq, D], key [L, N, H, D], value [L, N, H, Dv]) of tokens by number
    options:  scale, softcap, sink_logits
    """

    def __init__(
        self, policy, schedule, data, batch, *, first_head=0, spans=(), append=False, interval=64, options=None
    ):
        self.policy, self.schedule, self.first_head, self.spans = policy, schedule, first_head, spans
        self.append, self.interval, self.options = append, interval, options or {}
        self.recent_window = policy.recent_window
        self.query, self.key, self.value = data
        self.num_layers, self.num_heads = self.key.shape[0], self.key.shape[2]
        self.rows = [Sequence(self.num_layers, self.num_heads) for _ in range(batch)]
        self.decoded = 0

    # --- the rules

    def is_pinned(self, position):
        in_span = any(begin <= position < end for begin, end in self.spans)
        return position < self.policy.num_sink_tokens or in_span

    def capacity(self, row, layer, head):
        """Protected spans come on top; sink tokens are inside."""
        spanned = 0
        if self.spans:
            spanned = sum(self.is_pinned(p) for p in range(self.policy.num_sink_tokens, row.settled))
        return (0 if row.table is None else row.table[layer][self.first_head + head]) + spanned

    def order(self, row, position, score):
        """What stays is larger: pinned entries, then the recent window, then by score; at equal scores the newer."""
        if self.is_pinned(position):
            return (2, 0.0, position)
        if position >= row.settled - self.recent_window:
            return (1, 0.0, position)
        return (0, float(position) if self.policy.window_rule else score, position)

    def grow(self, row):
        if row.table is None or row.settled > row.counted:
            row.table, row.counted = self.schedule.at(row.settled, row.table), row.settled

    # --- what happens

    def forward(self, columns, hold=0):
        """Several tokens. columns[b]: a token's number, or None for padding. Returns [L, B, Hq, n, Dv], zeros there.

        Tokens see what was held before, and one another causally; then each KV head keeps its best. The last `hold`
        columns stay pending.
        """
        outs, settles = [], False
        for row, new in zip(self.rows, columns, strict=True):
            before = list(row.pending)
            fresh = []
            for token in new:
                fresh.append(None if token is None else len(row.tokens))
                row.tokens += [] if token is None else [token]
            outs.append(self.look(row, fresh, [p for p in before if p is not None]))
            waiting = before + fresh
            cut = max(0, len(waiting) - hold)
            leaving, row.pending = [p for p in waiting[:cut] if p is not None], waiting[cut:]
            if cut:
                settles = True
                self.grow(row)
                for layer in range(self.num_layers):
                    self.keep(row, layer, leaving)
        if settles:
            self.decoded = 0
        return torch.stack(outs, 1)

    def keep(self, row, layer, leaving):
        for head, kept in enumerate(row.kept[layer]):
            scores = {p: self.ask(self.policy.first, row, layer, head, p, kept.get(p, 0.0)) for p in [*kept, *leaving]}
            best = sorted(scores, key=lambda p: self.order(row, p, scores[p]), reverse=True)
            best = best[: self.capacity(row, layer, head)]
            if len(best) < len(scores):
                row.evicted_at[layer] = row.settled
            row.kept[layer][head] = {p: scores[p] for p in best}

    def decode(self, tokens):
        """One token a row: the worst entry leaves where a KV head is full, the token is written, and all is looked at.

        Returns [L, B, Hq, 1, Dv].
        """
        self.decoded += 1
        outs = []
        for row, token in zip(self.rows, tokens, strict=True):
            row.tokens.append(token)
            if self.decoded % self.interval == 0:
                self.grow(row)
            position = len(row.tokens) - 1
            for layer in range(self.num_layers):
                for head, kept in enumerate(row.kept[layer]):
                    if not self.append and len(kept) >= self.capacity(row, layer, head):
                        del kept[min(kept, key=lambda p: self.order(row, p, kept[p]))]
                        row.evicted_at[layer] = row.settled
                    kept[position] = self.policy.new_entry_score
            outs.append(self.look(row, [position], []))
            if self.policy.later is not None:
                for layer in range(self.num_layers):
                    for head, kept in enumerate(row.kept[layer]):
                        for p in kept:
                            kept[p] = self.ask(self.policy.later, row, layer, head, p, kept[p])
        return torch.stack(outs, 1)

    def possible(self):
        """The most columns that can be taken back, and whether the next one is lacking because of an eviction."""
        pending = max(len(row.pending) for row in self.rows)
        return pending + min(row.settled - max(row.evicted_at) for row in self.rows)

    def crop(self, count):
        for row in self.rows:
            left = count
            while left and row.pending:
                left -= 1
                if row.pending.pop() is not None:
                    row.tokens.pop()
            for _ in range(left):
                row.tokens.pop()
                for layer in row.kept:
                    for kept in layer:
                        kept.pop(len(row.tokens))

    def ask(self, rule, row, layer, head, position, score):
        if position in row.kept[layer][head]:
            (key,), (value,) = self.entries(row, layer, head, [position])
        else:
            key, value = (x[layer, row.tokens[position], head] for x in (self.key, self.value))
        return rule(score, key, value, position)

    def look(self, row, fresh, pending):
        """Dense attention under a mask. fresh: positions of the new tokens, None for padding. [L, Hq, n, Dv]."""
        group = self.query.shape[2] // self.num_heads
        out = torch.zeros(self.num_layers, self.query.shape[2], len(fresh), self.value.shape[3], dtype=torch.float64)
        for column, position in enumerate(fresh):
            if position is None:
                continue
            chunk = [*pending, *(p for p in fresh[: column + 1] if p is not None)]
            for layer in range(self.num_layers):
                for head, kept in enumerate(row.kept[layer]):
                    new = [row.tokens[p] for p in chunk if p not in kept]
                    keys, values = (
                        torch.cat([old, states[layer, new, head]]).double()
                        for old, states in zip(
                            self.entries(row, layer, head, list(kept)), (self.key, self.value), strict=True
                        )
                    )
                    heads = slice(head * group, (head + 1) * group)
                    query = self.query[layer, row.tokens[position], heads].double()
                    out[layer, heads, column] = self.attention(query, keys, values, heads)
        return out

    def entries(self, row, layer, head, positions):
        """Keys and values of tokens that are held, as they are read: [n, D] and [n, Dv]."""
        tokens = [row.tokens[p] for p in positions]
        return self.key[layer, tokens, head], self.value[layer, tokens, head]

    def attention(self, query, key, value, heads):
        """One token's query heads over keys and values, in float64: [group, Dv]."""
        scale = self.options.get("scale") or key.shape[1] ** -0.5
        logits = query @ key.T * scale
        if (cap := self.options.get("softcap")) is not None:
            logits = cap * torch.tanh(logits / cap)
        if (sinks := self.options.get("sink_logits")) is not None:
            logits = torch.cat([logits, sinks[heads, None].double()], 1)
        return logits.softmax(1)[:, : len(key)] @ value
