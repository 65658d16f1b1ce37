"""A text as one model's tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kvpolicy.errors import ModelError, foreign
from kvpolicy.text.corpus import Corpus, make_corpus


def read_corpus(tokenizer: PreTrainedTokenizerBase, path: str | Path | None = None) -> Corpus:
    """The text at `path`, or Python's language reference, without repetitions and split for search and report.

    A model whose tokenizer starts every text with a beginning-of-sequence token gets it in front of each sequence.
    Raises `TextError`.
    """

    def tokenize(text: str) -> list[int]:
        with foreign(f"the tokenizer of {tokenizer.name_or_path} cannot read the text", ModelError):
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    start = tokenizer("").input_ids
    prefix = tuple(start) if start and start == [tokenizer.bos_token_id] else ()
    return replace(make_corpus(path, tokenize, prefix), tokenizer=tokenizer)
