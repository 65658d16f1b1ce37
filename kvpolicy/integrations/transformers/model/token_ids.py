"""Text as tokens of one model: what its chat template makes of a prompt, and ids that its embeddings know."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.errors import ModelError, foreign


def check_token_ids(model: PreTrainedModel, ids: Tensor, argument: str = "input_ids") -> None:
    """Raises `ModelError` unless `ids` are int [B, n], of one token at least, all of which the model has embeddings of.

    argument: its name
    """
    expected = f"{argument} must be int64 [sequences, tokens], with at least one of each"
    if not isinstance(ids, Tensor):
        raise ModelError(f"{expected}; got {type(ids).__name__}")
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.is_complex():
        hint = ": one sequence is ids[None]" if ids.ndim == 1 and ids.numel() else ""
        raise ModelError(f"{expected}; got {ids.dtype} {list(ids.shape)}{hint}")
    rows = model.get_input_embeddings().weight.shape[0]
    least, most = torch.stack(ids.aminmax()).tolist()  # waits for the device once
    if least < 0 or most >= rows:
        raise ModelError(
            f"{argument} holds the token {most if most >= rows else least}, but the model's embeddings are of tokens "
            f"0 to {rows - 1}: this tokenizer is of another model"
        )


def chat_turn(tokenizer: PreTrainedTokenizerBase, words: str, **options: Any) -> str:
    """A user's words in the chat template, up to where the model answers. options: for the template.

    A template that expects a list of parts gets one. Raises `ModelError` for a template that fails or leaves the words
    out.
    """
    try:
        return _rendered(tokenizer, words, options, as_parts=False)
    except ModelError as error:
        with contextlib.suppress(ModelError):
            return _rendered(tokenizer, words, options, as_parts=True)
        raise error


def _rendered(tokenizer: PreTrainedTokenizerBase, words: str, options: dict[str, Any], *, as_parts: bool) -> str:
    whose = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"

    def rendered(text: str) -> str:
        content = [{"type": "text", "text": text}] if as_parts else text
        chat: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, **options
        )
        return chat

    with foreign(f"{whose} fails", ModelError):
        chat, other = rendered(words), rendered(f"other {words}")
    if chat == other:
        raise ModelError(f"{whose} leaves out what the user says: it gives {chat[:40]!r} for every prompt")
    return chat
