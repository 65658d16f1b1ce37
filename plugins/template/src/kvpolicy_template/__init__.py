"""A kvpolicy plugin to copy from: this hook is all that kvpolicy needs to find the three classes."""

from __future__ import annotations

from kvpolicy import Register, hookimpl


@hookimpl
def kvpolicy_register(register: Register) -> None:
    # Addresses, not classes: a module is imported when its name is first used.
    register.estimator(
        "value_norm",
        "kvpolicy_template.value_norm:ValueNormEstimator",
        summary="KV heads with long values matter more.",
    )
    register.allocator(
        "softmax",
        "kvpolicy_template.softmax:SoftmaxAllocator",
        summary="A softmax of the importance, temperature searched.",
    )
    register.policy(
        "key_norm",
        "kvpolicy_template.key_norm:KeyNormPolicy",
        summary="Keep the entries with the shortest keys.",
        paper="arXiv:2406.11430",
    )
