"""Where files are kept that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """`KVPOLICY_CACHE`, or the user's cache directory."""
    return Path(os.environ.get("KVPOLICY_CACHE") or platformdirs.user_cache_path("kvpolicy", appauthor=False))
