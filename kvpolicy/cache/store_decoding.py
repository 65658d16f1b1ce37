"""A store token by token."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvpolicy.cache import inputs
from kvpolicy.cache.first_token import FirstToken
from kvpolicy.cache.layer import StoreLayer
from kvpolicy.cache.scoring import Scoring, score_step
from kvpolicy.cache.step import TailStep, plan_step
from kvpolicy.cache.store_layers import Layers
from kvpolicy.cache.tail import Tail
from kvpolicy.cache.tail_step import plan_on_top

GROWTH_INTERVAL = 64
"""Decoded tokens after which a growing budget is apportioned again, and the device is asked what went wrong on it.

Nobody waits for the answer: it is heard after as many more."""


class Decoding(Layers):
    """How a `RaggedStore` takes single tokens.

    A token is planned for all layers, then each layer writes it, attends and rescores. On a GPU nothing of that waits
    for the device, and a CUDA graph may hold the layers' part: see `advance`.

    first_token: how long the first one behind the prompt took
    """

    first_token: FirstToken

    def can_append(self, layer: int) -> bool:
        """Whether a single token can be appended; else it goes the way of a longer chunk."""
        entries = self._entries(layer)
        return entries is not None and _is_next(entries)

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes one token into every segment, or on top where it was planned there. key, value: [B, H, 1, dim]."""
        entries = self._open(layer, key, value)
        inputs.check_single(layer, key, _is_next(entries) or self._planned.has(layer, entries))
        step = self._planned.next(layer, entries)
        if step is None:  # else it was its turn when the token was planned
            self._check_turn(layer, entries.seen + 1)
            if layer == 0 and self.advance():
                step = self._planned.next(0, entries)
        if key.device.type == "cpu":
            self._finite.add(layer, keys=key, values=value)
        if isinstance(step, TailStep):
            entries.write_on_top(key, value, step)
        elif step is None:
            entries.append(key, value, self.policy.new_entry_score, evict=self.decode_mode == "evict")
        else:
            work = self._planned.work(layer, entries.arena)
            entries.write(key, value, step, self.policy.new_entry_score, work)

    def attend(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """query: [B, num_q_heads, n, D], which see every entry held. Returns [B, num_q_heads, n, Dv]."""
        entries = self._layer(layer)
        inputs.check_query(query, entries.arena.like, self.batch_size, self._num_q_heads)
        return entries.attend(query, scoring.options())

    def attend_newest(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """`attend` of the token that was appended, after which the policy rescores the entries if it does that at all.

        query: [B, num_q_heads, 1, D]
        """
        entries = self._layer(layer)
        inputs.check_query(query, entries.arena.like, self.batch_size, self._num_q_heads, 1)
        if not self.policy.rescores or entries.pending is not None:  # what is on top is scored when it settles
            return entries.attend(query, scoring.options())
        out = score_step(self.policy, entries, query, scoring.options(), self._wrong)
        if layer == len(self.layers) - 1 and query.device.type == "cpu":  # a GPU would be waited for
            self._wrong.check(self.policy, "score_step")
        return out

    def check_scores(self) -> None:
        """Raises `PluginError` where the policy has returned NaN at a decoded token. Waits for the device."""
        self._wrong.check(self.policy, "score_step")

    # --- for callers that replay a graph

    def advance(self, hold: int = 0) -> bool:
        """Plans the next token: makes room for it, and brings its tables to where the layers read them.

        hold: last tokens that stay on top, as in `keep`

        What the layers then do is the same for every token, on the device, as long as `layouts` stays what it is: it
        may be run, or replayed from a graph and then noted by `pass_step`.

        Returns whether the token could be planned; if not, each layer has to see for itself.
        """
        first = self._entries(0)
        if first is None:
            return False
        self.first_token.come()
        if self._planned.is_for(first) and self._planned.is_on_top == bool(hold):
            return True
        if hold:
            self._planned = plan_on_top(self.layers, hold)
            return self._planned.is_for(first)
        if self._grows_next(first):
            self._wrong.look(self.policy, "score_step")
            for layer in self._opened():  # before the plan, which is made of capacities
                self._grow(layer, layer.seen + 1)
        evict, grows = self.decode_mode == "evict", self.schedule.grows
        self._planned = plan_step(self.layers, self._tables, evict=evict, grows=grows)
        return self._planned.is_for(first)

    @property
    def layouts(self) -> list[object]:
        """For each layer, what stays the same while its entries lie where they lie, and a step is the same launches."""
        return [
            (
                layer.arena.layout,
                layer.max_positions,
                layer.has_order,
                layer.pending.columns if isinstance(layer.pending, Tail) else None,
            )
            for layer in self._opened()
        ]

    def pass_step(self) -> None:
        """Notes the planned token, which a graph has written into every layer, and plans the next one.

        That the device is still busy with this one is the best time for it. Not where capacities will have grown: until
        then nobody is to see it.
        """
        for index, entries in enumerate(self._opened()):
            step = self._planned.next(index, entries)
            assert step is not None  # planned, and nothing has changed since
            if isinstance(step, TailStep):
                entries.pass_on_top(step)
            else:
                entries.pass_step(step)
        first = self._layer(0)
        if isinstance(first.pending, Tail):
            self.advance(first.pending.columns.room)
        elif not self._grows_next(first):
            self.advance()

    def _grows_next(self, first: StoreLayer) -> bool:
        """Whether capacities are apportioned again for the next token."""
        return (first.decoded + 1) % GROWTH_INTERVAL == 0

    def bookmark(self) -> Callable[[], None]:
        """Returns what takes the store back to here, from behind layers whose work the device has not done."""
        planned, restores = self._planned, [layer.bookmark() for layer in self._opened()]
        due = planned.bookmark()

        def restore() -> None:
            due()
            self._planned = planned
            for back in restores:
                back()

        return restore


def _is_next(entries: StoreLayer) -> bool:
    """Whether a single token may come next."""
    return entries.pending is None and (entries.decoded > 0 or bool(entries.seen.any()))
