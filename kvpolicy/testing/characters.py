"""A tokenizer for the kit, so that checks need no model's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Encoding:
    input_ids: list[int]


class CharacterTokenizer:
    """What a task uses of a tokenizer of transformers: a token for each character, its code point; no template."""

    name_or_path = "one token a character"
    chat_template: str | None = None
    bos_token_id: int | None = None

    def __call__(self, text: str, **options: Any) -> Encoding:
        return Encoding(list(map(ord, text)))

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(map(chr, ids))
