"""A sequence in sets and dictionaries: what a store has to do, slowly and with dense masked attention."""

import torch

from kvpolicy.cache.store_decoding import GROWTH_INTERVAL
from tests.cache.policies import HeavyHitter, oracle_scores


class Row:
    """One sequence in one layer.

    query: [num_q_heads, T, D];  key, value: [H, T, dim];  capacities: tokens -> entries of each head, without spans
    kept:  for each head {position: score};  pending: positions that may still be taken back
    """

    def __init__(self, policy, query, key, value, capacities, spans=(), append=False, options=None):
        self.policy, self.query, self.key, self.value = policy, query, key, value
        self.capacities, self.spans, self.append, self.options = capacities, spans, append, options or {}
        self.num_heads = key.shape[0]
        self.kept = [{} for _ in range(self.num_heads)]
        self.pending = []
        self.seen = self.decoded = 0
        self.table = [0] * self.num_heads

    @property
    def settled(self):
        return self.seen - len(self.pending)

    def spanned(self, position):
        return any(begin <= position < end for begin, end in self.spans)

    def is_protected(self, position):
        return position < self.policy.num_sink_tokens or self.spanned(position)

    def capacity(self, head):
        sinks = self.policy.num_sink_tokens
        return self.table[head] + sum(self.spanned(p) for p in range(sinks, self.settled))

    @property
    def spanned_to_come(self):
        """Tokens that are not settled yet and will come on top of the capacity."""
        first = max(self.settled, self.policy.num_sink_tokens)
        return sum(self.spanned(p) for p in range(first, max((end for _, end in self.spans), default=0)))

    def prompt(self, count, hold=0):
        """Returns the outputs of the tokens, [num_q_heads, count, Dv]."""
        tokens = list(range(self.seen, self.seen + count))
        chunk = self.pending + tokens
        out, mass, window_mass = self.attend(tokens, chunk)
        self.seen += count
        folded, self.pending = (chunk[:-hold], chunk[-hold:]) if hold else (chunk, [])
        if folded or not hold:
            self.decoded = 0
            self.table = self.capacities(self.settled)
            for head in range(self.num_heads):
                candidates = [*self.kept[head], *folded]
                scores = oracle_scores(self.policy, self, head, candidates, mass[head], window_mass[head])
                order = sorted(candidates, key=lambda p: self.rank(p, scores[p]), reverse=True)
                self.kept[head] = {p: scores[p] for p in order[: self.capacity(head)]}
        return out

    def decode(self):
        """Returns [num_q_heads, 1, Dv]."""
        self.seen += 1
        self.decoded += 1
        if self.decoded % GROWTH_INTERVAL == 0:
            self.table = self.capacities(self.seen)
        token = self.seen - 1
        for head, kept in enumerate(self.kept):
            if len(kept) >= self.capacity(head) and not self.append:
                del kept[min(kept, key=lambda p: self.rank(p, kept[p]))]
            kept[token] = self.policy.new_entry_score
        out, mass, _ = self.attend([token], [])
        if isinstance(self.policy, HeavyHitter):
            for head, kept in enumerate(self.kept):
                for p in kept:
                    kept[p] += mass[head][p]
        return out

    def crop(self, count):
        for _ in range(count):
            self.seen -= 1
            if self.pending:
                self.pending.pop()
            else:
                for kept in self.kept:
                    del kept[self.seen]

    def rank(self, position, score):
        """Larger is kept."""
        if self.is_protected(position):
            return (2, 0.0, position)
        if position >= self.settled - self.policy.recent_window:
            return (1, 0.0, position)
        return (0, position if self.policy.window_rule else score, position)

    def attend(self, tokens, chunk):
        """Dense attention under a mask. Outputs, and for each head {position: mass} of all queries and of the last."""
        group = self.query.shape[0] // self.num_heads
        outputs, masses, windows = [], [], []
        for head, kept in enumerate(self.kept):
            positions = [*kept, *chunk]
            inside = torch.tensor([[p not in chunk or p <= t for p in positions] for t in tokens], dtype=torch.bool)
            visible = inside.view(len(tokens), len(positions))
            heads = range(head * group, (head + 1) * group)
            k, v = self.key[head, positions], self.value[head, positions]
            both = [dense_attention(self.query[q, tokens], k, v, visible, q, **self.options) for q in heads]
            weights = torch.stack([weight for weight, _ in both])
            last = weights[:, -self.policy.observation_window :]
            masses.append(dict(zip(positions, weights.sum((0, 1)).tolist(), strict=True)))
            windows.append(dict(zip(positions, last.sum((0, 1)).tolist(), strict=True)))
            outputs += [out for _, out in both]
        return torch.stack(outputs), masses, windows


def dense_attention(query, key, value, visible, head, scale=None, softcap=None, sink_logits=None):
    """One query head. Returns the weights [n, m] and the outputs [n, Dv]."""
    scores = (query @ key.T) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits[head].expand(len(query), 1)], 1)
    weights = scores.softmax(-1)[:, : key.shape[0]]
    return weights, weights @ value
