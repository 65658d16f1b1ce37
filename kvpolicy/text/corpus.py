"""Calibration text: where it comes from, and a split that the search cannot see across."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError, TextError
from kvpolicy.files.regular import read_start

RUN = 192
"""A run of this many bytes of UTF-8 that was seen before marks its paragraph as a repetition. White space does not
count: about 30 English words, or 64 Chinese characters."""
SEARCH_PART = 0.6
"""Share of the text that the search may see; the rest is held out."""
_MAX_CHARACTERS = 20_000_000
_MAX_BYTES = 4 * _MAX_CHARACTERS  # that they can take
_WHOLE = 40  # bytes from which a whole paragraph is a repetition; shorter ones ("Examples:") say little
_LONGEST = 2000  # characters of a paragraph; a longer one is cut, so that a text of one line can be split too
_LONG_WORD = 30  # bytes: what is longer between two spaces is no word, but a script without spaces, or a table of data
_ENDS = (
    ("\n",),
    (". ", "! ", "? ", "\u3002", "\uff01", "\uff1f"),  # the last three: Chinese and Japanese
    (" ", "\t", "\u3000"),
)  # where a paragraph is best cut, best first

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
                f"{count * body}: give a longer text or a shorter context"
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
    """(name, text) of a UTF-8 file, its first 80 MB, or of CPython's own language reference. Raises `TextError`."""
    if path is None:
        from pydoc_data.topics import topics

        return "Python's language reference (pydoc_data.topics)", "\n\n".join(topics[key] for key in sorted(topics))
    try:
        data = read_start(path, _MAX_BYTES)
        whole = len(data) < _MAX_BYTES  # otherwise the last character may be cut
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise TextError(f"the text {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except KVPolicyError as error:
        raise TextError(f"cannot read the text {path}: {error}") from None
    return Path(path).name, text.replace("\r\n", "\n").replace("\r", "\n")


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
    """The paragraphs, less each that stood there before, and each that would repeat a run of `RUN` bytes already kept.

    Runs begin at words, in scripts without spaces at every character. They are counted across paragraph borders, so
    that afterwards every run is unique, and any two contiguous parts share none.
    """
    kept: list[str] = []
    seen: set[int] = set()
    tail = _Words(b"", [])
    for paragraph in _paragraphs(text):
        own = _Words.of(paragraph)
        words = tail + own
        marks = words.runs()
        if len(own.written) >= _WHOLE:
            marks.append(hash((own.written,)))  # the whole, which is no run
        if not own.written or len(set(marks)) < len(marks) or not seen.isdisjoint(marks):
            continue
        kept.append(paragraph)
        seen.update(marks)
        tail = words.unfinished()
    return kept


def split(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """(search, held-out): the first paragraphs with 60 % of the characters, and the rest."""
    counts = torch.tensor([len(paragraph) for paragraph in paragraphs], dtype=torch.int64)
    border = int((counts.cumsum(0) <= SEARCH_PART * int(counts.sum())).sum())
    return paragraphs[:border], paragraphs[border:]


def _paragraphs(text: str) -> Iterator[str]:
    """What stands between blank lines, cut where it is too long."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        begin = 0
        while len(paragraph) - begin > _LONGEST:
            end = _end(paragraph, begin)
            yield paragraph[begin:end].removesuffix("\n")
            begin = end
        yield paragraph[begin:]


def _end(paragraph: str, begin: int) -> int:
    """Where a piece of a quarter to half of `_LONGEST` characters ends best."""
    least, most = begin + _LONGEST // 4, begin + _LONGEST // 2
    for marks in _ENDS:
        end = max(paragraph.rfind(mark, least, most) + len(mark) for mark in marks)
        if end > least:
            return end
    return most


@dataclass(frozen=True, slots=True)
class _Words:
    """written: UTF-8 without white space;  begins: where runs begin in it, rising."""

    written: bytes
    begins: list[int]

    @classmethod
    def of(cls, text: str) -> _Words:
        begins, offset = [], 0
        words = [word.encode("utf-8", "replace") for word in text.split()]
        for word in words:
            if len(word) <= _LONG_WORD and word.isascii():
                begins.append(offset)
            else:
                begins += [offset + i for i, byte in enumerate(word) if byte & 0xC0 != 0x80]  # each character
            offset += len(word)
        return cls(b"".join(words), begins)

    def __add__(self, other: _Words) -> _Words:
        shift = len(self.written)
        return _Words(self.written + other.written, self.begins + [shift + begin for begin in other.begins])

    def runs(self) -> list[int]:
        """A hash of each run that is whole."""
        last = len(self.written) - RUN
        return [hash(self.written[begin : begin + RUN]) for begin in self.begins if begin <= last]

    def unfinished(self) -> _Words:
        """The end, in which runs begin that are not whole yet."""
        last = len(self.written) - RUN
        begins = [begin for begin in self.begins if begin > last]
        first = begins[0] if begins else len(self.written)
        return _Words(self.written[first:], [begin - first for begin in begins])
