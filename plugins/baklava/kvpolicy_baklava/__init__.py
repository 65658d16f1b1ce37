"""BaKlaVa (arXiv:2502.13176), reconstructed: see docs/explanation/baklava.md for what is known and what is chosen."""

from __future__ import annotations

from kvpolicy import Register, hookimpl


@hookimpl
def kvpolicy_register(register: Register) -> None:
    register.estimator(
        "cosine",
        "kvpolicy_baklava.estimator:CosineEstimator",
        summary="How much a head changes its input: 1 - cosine similarity (reconstructed).",
        paper="arXiv:2502.13176",
        when="With the allocator baklava; a few forwards are enough.",
    )
    register.allocator(
        "baklava",
        "kvpolicy_baklava.allocator:BaklavaAllocator",
        summary="Shares by layer and head importance, with searched exponents (reconstructed).",
        paper="arXiv:2502.13176",
        when="As the reference, searched in seconds a level; power and learned did better.",
    )
