"""Calibration text: where it comes from, and a split that the search cannot see across."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import TextError

RUN_WORDS = 30
"""A run of this many words that was seen before marks its paragraph as a repetition."""
SEARCH_PART = 0.6
"""Share of the words that the search may see; the rest is held out."""
_MAX_CHARACTERS = 20_000_000

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text without repetitions, split contiguously, as token ids.

    name, sha256: of the text as it was read
    search, heldout: int64 `[n]` token ids of the two parts
    prefix: ids put before every sequence (a model's beginning-of-sequence token), often empty
    tokenize: what turned the text into ids, None for a corpus of ids alone
    tokenizer: the transformers tokenizer behind it, for prompts that are made and answers that are read
    """

    name: str
    sha256: str
    search: Tensor
    heldout: Tensor
    prefix: tuple[int, ...] = ()
    tokenize: Tokenize | None = None
    tokenizer: Any = None

    @property
    def whole(self) -> Tensor:
        """Both parts, int64 `[n]`: for a report on a text that nothing was searched on."""
        return torch.cat([self.search, self.heldout])

    def sequences(self, part: str, count: int, length: int) -> Tensor:
        """int64 `[count, length]`, spread evenly over the part, not overlapping.

        Raises `TextError` when the part is too short for `count` sequences.
        """
        ids: Tensor = getattr(self, part)
        body = length - len(self.prefix)
        if count * body > len(ids):
            raise TextError(
                f"the {part} part of {self.name} has {len(ids)} tokens, but {count} sequences of {length} need "
                f"{count * body}: give a longer --text or a smaller --context"
            )
        stride = len(ids) // count
        rows = [
            torch.cat([torch.tensor(self.prefix, dtype=torch.int64), ids[i * stride :][:body]]) for i in range(count)
        ]
        return torch.stack(rows)

    def room(self, part: str, length: int) -> int:
        """How many sequences of `length` the part holds."""
        return int(len(getattr(self, part)) // (length - len(self.prefix)))

    def prompts(self, length: int, part: str = "search") -> list[Tensor]:
        """Profiling prompts of several lengths up to `length`, from one part."""
        sizes = [max(2, length // divisor) for divisor in (8, 4, 4, 2, 2, 1)]
        return [self.sequences(part, len(sizes), length)[i, :size] for i, size in enumerate(sizes)]


def read_text(path: str | Path | None) -> tuple[str, str]:
    """(name, text) of a UTF-8 file, or of CPython's own language reference. Raises `TextError`."""
    if path is None:
        from pydoc_data.topics import topics

        return "Python's language reference (pydoc_data.topics)", "\n\n".join(topics[key] for key in sorted(topics))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"the text {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise TextError(f"cannot read the text {path}: {error.strerror}") from error
    return Path(path).name, text


def make_corpus(path: str | Path | None, tokenize: Tokenize, prefix: tuple[int, ...] = ()) -> Corpus:
    """Reads, removes repetitions, splits, tokenises. Raises `TextError` for a text without words."""
    name, text = read_text(path)
    search, heldout = split(without_repetitions(text[:_MAX_CHARACTERS]))
    if not search or not heldout:
        raise TextError(f"{name} has too few words to be split into a search and a held-out part")
    return Corpus(
        name=name,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        search=torch.tensor(tokenize("\n\n".join(search)), dtype=torch.int64),
        heldout=torch.tensor(tokenize("\n\n".join(heldout)), dtype=torch.int64),
        prefix=prefix,
        tokenize=tokenize,
    )


def without_repetitions(text: str) -> list[str]:
    """The paragraphs, less each that would repeat a run of 30 words already kept.

    Runs are counted across paragraph borders, so that afterwards every run of 30 words is unique, and any two
    contiguous parts share none.
    """
    kept: list[str] = []
    seen: set[int] = set()
    tail: tuple[str, ...] = ()
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        words = tail + tuple(paragraph.split())
        runs = [hash(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)]
        if not paragraph.strip() or len(set(runs)) < len(runs) or not seen.isdisjoint(runs):
            continue
        kept.append(paragraph)
        seen.update(runs)
        tail = words[max(0, len(words) - RUN_WORDS + 1) :]
    return kept


def split(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """(search, held-out): the first paragraphs with 60 % of the words, and the rest."""
    counts = torch.tensor([len(paragraph.split()) for paragraph in paragraphs], dtype=torch.int64)
    border = int((counts.cumsum(0) <= SEARCH_PART * int(counts.sum())).sum())
    return paragraphs[:border], paragraphs[border:]
