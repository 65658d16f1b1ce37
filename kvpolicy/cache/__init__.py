"""Caches whose bytes are the budget's."""

from kvpolicy.cache.store import RaggedStore

__all__ = ["RaggedStore"]
