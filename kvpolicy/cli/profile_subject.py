"""What `kvpolicy profile` asks about, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvpolicy.integrations.transformers import TransformersProbe, load_model, read_corpus
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Corpus


class Subject:
    """A loaded model, the length of its sequences, and who is told of progress."""

    def __init__(
        self, name: str, context: int, progress: Progress, *, revision: str | None, device: str, dtype: str
    ) -> None:
        self.name, self.context, self.progress = name, context, progress
        self._network, self._tokenizer = load_model(name, revision=revision, device=device, dtype=dtype)

    def corpus(self, path: Path | None) -> Corpus:
        return read_corpus(self._tokenizer, path)

    def probe(self, corpus: Corpus, sequences: Tensor, prompts: Sequence[Tensor] = ()) -> TransformersProbe:
        return TransformersProbe(self._network, sequences, prompts, tokenize=corpus.tokenize)

    def title(self, said: str, text: str) -> str:
        """The head of a picture: what it shows, of which model, on which text."""
        dtype = str(self._network.dtype).removeprefix("torch.")
        return f"{said}\n{self.name}, {text}, context {self.context}, {dtype}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What was measured: as JSON, as a picture, and as lines and tables for the terminal."""

    document: dict[str, Any]
    picture: Callable[[], bytes]
    shown: Callable[[], Iterable[Any]]
