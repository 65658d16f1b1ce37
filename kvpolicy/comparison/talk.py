"""Conversations of a batch over one cache: questions of any lengths, and answers that end at different times."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.integrations.transformers import with_cache
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.plugins.task_role import Sample


class Talk:
    """What has been said behind the prompts of a batch. Each row goes on as if it were alone.

    logits:  [B, 1, vocabulary], behind each prompt
    lengths: tokens of each prompt; shorter ones were padded on the left
    ends:    tokens that end an answer
    """

    def __init__(self, model: Any, cache: Any, logits: Tensor, lengths: Sequence[int], ends: Collection[int]) -> None:
        self.model, self.cache, self.ends = model, cache, ends
        self._likeliest = logits[:, -1].argmax(-1).tolist()
        self._next = torch.tensor(lengths)  # the position of each row's next token
        self._mask = torch.arange(max(lengths)) >= max(lengths) - self._next[:, None]
        self._unfed: list[list[int]] = [[] for _ in lengths]

    @staticmethod
    def room(samples: Sequence[Sample], max_new_tokens: int) -> int:
        """Columns that all turns take at most."""
        turns = max(len(sample.questions) for sample in samples)
        longest = [max(map(len, sample.questions)) for sample in samples]
        return turns * (max(longest) + max_new_tokens + 1)

    def ask(self, questions: Sequence[Sequence[int]]) -> None:
        """Feeds what each row has not been fed of its answer, and its question; nothing for an empty one."""
        pairs = zip(self._unfed, questions, strict=True)
        self._feed([[*unfed, *question] if question else [] for unfed, question in pairs])

    def answer(self, asked: Sequence[bool], last: Sequence[bool], most: int) -> list[list[int]]:
        """The likeliest tokens of each row that was asked, up to an end or `most` of them; none of the others.

        last: whether a row says nothing after this, so that what is fed behind its end does not matter
        """
        answers = [[token] if is_asked else [] for token, is_asked in zip(self._likeliest, asked, strict=True)]
        while any(self._goes_on(answer, most) for answer in answers):
            going = [self._goes_on(answer, most) for answer in answers]
            fed = zip(self._likeliest, going, last, strict=True)
            self._feed([[token] if goes_on or is_last else [] for token, goes_on, is_last in fed])
            for answer, goes_on, token in zip(answers, going, self._likeliest, strict=True):
                answer.extend([token] if goes_on else [])
        self._unfed = [answer[-1:] if answer and answer[-1] not in self.ends else [] for answer in answers]
        return answers

    def _goes_on(self, answer: Sequence[int], most: int) -> bool:
        return bool(answer) and answer[-1] not in self.ends and len(answer) < most

    def _feed(self, pieces: Sequence[Sequence[int]]) -> None:
        """One forward of a piece for each row, padded on the left. Masks and positions only where there is padding."""
        length = max(map(len, pieces))
        counts = torch.tensor([len(piece) for piece in pieces])
        ids = torch.tensor([[0] * (length - len(piece)) + list(piece) for piece in pieces])
        valid = torch.arange(length) >= length - counts[:, None]
        self._mask = torch.cat([self._mask, valid], 1)
        options: dict[str, Tensor] = {}
        if not bool(self._mask.all()):
            places = (self._next[:, None] + valid.cumsum(1) - 1).clamp(min=0)
            options = {"attention_mask": self._mask.long(), "position_ids": places}
        self._next = self._next + counts
        options = {name: value.to(self.model.device) for name, value in {"input_ids": ids, **options}.items()}
        logits = self.model(
            **options, **with_cache(self.model, self.cache), use_cache=True, **keep_logits(self.model)
        ).logits
        self._likeliest = logits[:, -1].argmax(-1).tolist()
