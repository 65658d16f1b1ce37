"""Budgets per KV head inside vLLM: `--additional-config '{"kvpolicy": {"plan": "plan.json", "tokens": 1024}}'`."""

from __future__ import annotations

__version__ = "0.2.0"


def register() -> None:
    """Called by vLLM in each of its processes (`vllm.general_plugins`); calling it again does nothing."""
    from kvpolicy_vllm.hooks import install

    install()
