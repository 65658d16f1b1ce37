"""The ragged cache: one arena a layer, one segment per (sequence, KV head). torch only."""

from kvpolicy.cache.store import RaggedStore

__all__ = ["RaggedStore"]
