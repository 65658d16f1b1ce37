"""Caches whose bytes are the budget's."""

from kvpolicy.cache.report import CacheReport
from kvpolicy.cache.store import RaggedStore

__all__ = ["CacheReport", "RaggedStore"]
