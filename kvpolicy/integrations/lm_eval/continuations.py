"""Log-likelihoods behind a compressed context, and of a text that streams through a cache. Needs no harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.integrations.transformers import RaggedCache, attached, repeat_context, with_cache
from kvpolicy.integrations.transformers.model.logits import keep_logits

Likelihood = tuple[float, bool]
"""The sum of the log-likelihoods of a continuation's tokens, and whether greedy decoding says each of them."""
CHUNK = 128
"""Tokens of a streaming text that are read in one forward."""


class ContinuationScorer:
    """Scores continuations over caches of one kind.

    model, tokenizer: of transformers
    make_cache:       makes an empty one for the model

    keeps_all: whether the caches keep every entry as it is. Texts are then read in one forward, not in two or in
        chunks: the sums of matrix products run in the order of a plain forward, and the last digit is the same
    """

    def __init__(self, model: Any, tokenizer: Any, make_cache: Callable[[], RaggedCache]) -> None:
        self.model, self.tokenizer, self.make_cache = model, tokenizer, make_cache
        recipe = make_cache().recipe  # refuses here what it would refuse at the first text
        self.keeps_all = recipe is not None and recipe.ask.retention == 1 and recipe.entry_format is None

    def behind(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Likelihood]:
        """One for each continuation, of one token or more. The context, of one token or more, is read and compressed
        once; each continuation goes on with a copy, and is kept on top of the capacities.
        """
        if self.keeps_all:
            return self._behind_all(context, continuations)
        with torch.no_grad(), attached(self.model):
            cache, ids = self.make_cache(), self._ids(context)
            first = self.model(ids, **with_cache(self.model, cache), use_cache=True, **keep_logits(self.model)).logits
            if cache.awaits_repeat:
                repeat_context(self.model, cache, ids, self.tokenizer)
            cache.check_enforced()
            return [_likelihood(self._logits(cache, first[:, -1:], tokens), tokens) for tokens in continuations]

    def streaming(self, context: Sequence[int], text: Sequence[int]) -> float:
        """The sum of a text's log-likelihoods: it is read in chunks, each over what the cache has kept until then.

        context: tokens that are read first and not scored, one or more
        """
        ids, total, behind = [*context, *text][:-1], 0.0, len(context) - 1
        targets = [*context, *text][1:]
        if self.keeps_all:
            return _likelihood(self._plain(ids)[:, behind:], text)[0]
        with torch.no_grad(), attached(self.model):
            cache = self.make_cache()
            for begin in range(0, len(ids), CHUNK):
                chunk = self._ids(ids[begin : begin + CHUNK])
                logits = self.model(chunk, **with_cache(self.model, cache), use_cache=True).logits
                if cache.awaits_repeat:
                    repeat_context(self.model, cache, chunk, self.tokenizer)
                skipped = max(0, behind - begin)
                scored = targets[begin : begin + CHUNK][skipped:]
                total += _likelihood(logits[:, skipped:], scored)[0] if scored else 0.0
            cache.check_enforced()
        return total

    def _behind_all(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Likelihood]:
        """A forward for each continuation; those that differ in their last token share one."""
        logits: dict[tuple[int, ...], Tensor] = {}
        for tokens in continuations:
            fed = tuple(tokens[:-1])
            if fed not in logits:
                logits[fed] = self._plain([*context, *fed])[:, -len(tokens) :].clone()
        return [_likelihood(logits[tuple(tokens[:-1])], tokens) for tokens in continuations]

    def _plain(self, ids: Sequence[int]) -> Tensor:
        """Logits `[1, n, vocabulary]` of a text in one forward. All of them: a product of four rows or fewer sums in
        another order on a CPU.
        """
        with torch.no_grad(), attached(self.model):
            cache = self.make_cache()
            logits: Tensor = self.model(self._ids(ids), **with_cache(self.model, cache), use_cache=True).logits
            cache.check_enforced()
        return logits

    def _logits(self, cache: RaggedCache, first: Tensor, tokens: Sequence[int]) -> Tensor:
        """Of each token of a continuation, `[1, n, vocabulary]`. first: those behind the context"""
        if len(tokens) == 1:
            return first
        own = cache.fork()
        own.hold(len(tokens) - 1)
        fed = self._ids(tokens[:-1])
        behind = self.model(fed, **with_cache(self.model, own), use_cache=True).logits
        own.check_enforced()
        return torch.cat([first, behind], 1)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)


def _likelihood(logits: Tensor, tokens: Sequence[int]) -> Likelihood:
    """logits: `[1, n, vocabulary]`, each position's before its token"""
    targets = torch.tensor(list(tokens), device=logits.device)
    each = torch.log_softmax(logits[0].float(), -1).gather(1, targets[:, None])
    return float(each.sum()), bool((logits[0].argmax(-1) == targets).all())
