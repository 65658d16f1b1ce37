"""GGUF files as safetensors: a copy of each in the user's cache, dequantised once and checked whenever it is read.

Loading the copy takes a second or two instead of 20; checking its sums is a good half of one for 540 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpolicy.errors import ModelError, ModelWarning, first_line, foreign
from kvpolicy.files.user_cache import cache_directory
from kvpolicy.integrations.transformers.model.checkpoint import check_filled
from kvpolicy.integrations.transformers.model.quiet import quiet

SUMS = "sha256.json"
"""File of a copy that holds the sum of each other one."""


def converted(gguf: Path) -> Path:
    """The directory of a GGUF file's copy, which is made where there is none, or a damaged one.

    Warns, with `ModelWarning`, of a damaged one. Raises `ModelError` naming the file.
    """
    target = _copy_of(gguf)
    damage = _damage(target) if target.exists() else None
    if target.exists() and damage is None:
        return target
    with _kept_in(target) as staging:
        _convert(gguf, staging)
        sums = {file.name: _sha256(file) for file in staging.iterdir()}
        (staging / SUMS).write_text(json.dumps(sums, indent=1))
    if damage is not None:
        message = f"the converted copy of {gguf.name} in {target} was damaged ({damage}): it was made again"
        warnings.warn(message, ModelWarning, stacklevel=3)
    return target


def sound_copy(gguf: Path) -> Path | None:
    """The directory of a GGUF file's copy if there is a sound one."""
    target = _copy_of(gguf)
    return target if target.exists() and _damage(target) is None else None


def copies() -> list[tuple[Path, str | None]]:
    """The directory of each copy that is kept, and what is wrong with it, None if nothing is. Reads all of them."""
    folder = cache_directory() / "models"
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [(path, _damage(path)) for path in found if not path.name.startswith(".partial-")]


def _copy_of(gguf: Path) -> Path:
    """Where the copy lies or will lie: named by the content of the file."""
    with foreign(f"cannot read the GGUF file {gguf}", ModelError):
        return cache_directory() / "models" / f"{gguf.stem}-{_sha256(gguf)[:16]}"


def _damage(target: Path) -> str | None:
    """What is wrong with a copy, None if nothing is."""
    try:
        sums = json.loads((target / SUMS).read_bytes())
        names = {path.name for path in target.iterdir()} - {SUMS}
        both = names & set(sums)
        wrong = sorted((names ^ set(sums)) | {name for name in both if _sha256(target / name) != sums[name]})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{SUMS}: {first_line(error)}"
    return f"{', '.join(wrong)} changed" if wrong else None


@contextlib.contextmanager
def _kept_in(target: Path) -> Iterator[Path]:
    """An empty directory, which becomes `target` at the end. Whoever comes second keeps what is there by then.

    On the same disk, so that it is one rename. Raises `ModelError` where that cannot be written.
    """
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        yield staging
        if target.exists() and _damage(target):
            shutil.rmtree(target)
        if not target.exists():
            staging.rename(target)
    except OSError as error:
        raise ModelError(
            f"cannot write the converted copy {target}: {error.strerror or error}; set KVPOLICY_CACHE to another place"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer into `folder`. Raises `ModelError` naming the file."""
    source, file = str(gguf.parent), gguf.name
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar has no switch
        with foreign(f"cannot read the GGUF file {gguf}, cut short, damaged or unknown to transformers", ModelError):
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
            model, info = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=file, dtype=torch.float32, output_loading_info=True
            )
        check_filled(model, info, f"the GGUF file {gguf}")
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are dequantised; saving refuses the GGUF label
        plain = type(model)(config)
        plain.load_state_dict(model.state_dict())
        with foreign(f"cannot write the converted copy of {gguf}", ModelError):
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
