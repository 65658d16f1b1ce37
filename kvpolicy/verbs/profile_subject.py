"""What a profile is made of: a model, and the length of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from kvpolicy.integrations.transformers import LayerSharing, TransformersProbe, find_sharing, load_model, read_corpus
from kvpolicy.model.spec import ModelSpec
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Corpus


class Subject:
    """A loaded model, the length of its sequences, and who is told of progress."""

    def __init__(
        self, name: str, context: int, progress: Progress, *, revision: str | None, device: str, dtype: str
    ) -> None:
        self.name, self.context, self.progress = name, context, progress
        self._network, self._tokenizer = load_model(name, revision=revision, device=device, dtype=dtype)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_config(self._network.config)

    def corpus(self, path: Path | None) -> Corpus:
        return read_corpus(self._tokenizer, path)

    def probe(self, corpus: Corpus, sequences: Tensor, prompts: Sequence[Tensor] = ()) -> TransformersProbe:
        return TransformersProbe(self._network, sequences, prompts, tokenize=corpus.tokenize)

    def sharing(self, texts: Tensor, count: int, *, most_similar: bool) -> LayerSharing:
        return find_sharing(self._network, texts, count, most_similar=most_similar, progress=self.progress)

    def title(self, heading: str, text: str) -> str:
        """The head of a picture: what it shows, of which model, on which text."""
        dtype = str(self._network.dtype).removeprefix("torch.")
        return f"{heading}\n{self.name}, {text}, context {self.context}, {dtype}"
