"""Baselines: what every method is compared with."""

from __future__ import annotations

from kvpolicy import Register, hookimpl


@hookimpl
def kvpolicy_register(register: Register) -> None:
    module = "kvpolicy_baselines"
    register.estimator("uniform", f"{module}.uniform:UniformEstimator", summary="Every KV head matters alike.")
    register.allocator("uniform", f"{module}.uniform:UniformAllocator", summary="The same capacity for every KV head.")
    register.policy(
        "streaming",
        f"{module}.streaming:StreamingPolicy",
        summary="Keep the first tokens and the most recent ones.",
        paper="arXiv:2309.17453",
    )
    register.allocator(
        "pyramid",
        f"{module}.pyramid:PyramidAllocator",
        summary="More entries for the first layers, fewer for the last.",
        paper="arXiv:2406.02069",
    )
    register.allocator(
        "adakv",
        f"{module}.adakv:AdaKVAllocator",
        summary="Split each layer's budget by the prompt's best scores, at run time.",
        paper="arXiv:2407.11550",
    )
    register.policy(
        "h2o",
        f"{module}.h2o:H2OPolicy",
        summary="Keep what all queries so far have attended to most, and the most recent.",
        paper="arXiv:2306.14048",
    )
    register.policy(
        "snapkv",
        f"{module}.snapkv:SnapKVPolicy",
        summary="Keep what the prompt's last queries attend to, in clusters.",
        paper="arXiv:2404.14469",
    )
    register.policy(
        "tova",
        f"{module}.tova:TOVAPolicy",
        summary="Keep what the last query attends to.",
        paper="arXiv:2401.06104",
    )
    register.policy(
        "l2norm",
        f"{module}.l2norm:L2NormPolicy",
        summary="Keep the entries with the shortest keys.",
        paper="arXiv:2406.11430",
    )
    register.policy(
        "keydiff",
        f"{module}.keydiff:KeyDiffPolicy",
        summary="Keep the entries whose keys are unlike the others.",
        paper="arXiv:2504.15364",
    )
    register.policy("random", f"{module}.random:RandomPolicy", summary="Keep entries at random: the control.")
    register.policy(
        "corm",
        f"{module}.corm:CORMPolicy",
        summary="Keep what recent queries found important.",
        paper="arXiv:2404.15949",
    )
    register.policy(
        "r_kv",
        f"{module}.r_kv:RKVPolicy",
        summary="Keep what is attended to and not said twice, for long output.",
        paper="arXiv:2505.24133",
    )
    register.policy(
        "kvzip",
        f"{module}.kvzip:KVzipPolicy",
        summary="Keep what the model looks at when it repeats its context.",
        paper="arXiv:2505.23416",
    )
    register.estimator(
        "layer_cosine",
        f"{module}.layer_cosine:LayerCosineEstimator",
        summary="How much attention turns the residual stream, layer by layer.",
        paper="arXiv:2404.04793",
    )
    register.estimator(
        "entropy",
        f"{module}.entropy:EntropyEstimator",
        summary="How many entries a KV head needs to keep most of its attention (reconstructed).",
        paper="arXiv:2412.09036",
    )
    register.estimator(
        "retrieval",
        f"{module}.retrieval:RetrievalEstimator",
        summary="How much a KV head looks at the answer, in prompts with a needle.",
        paper="arXiv:2410.19258",
    )
    register.estimator(
        "shuffled",
        f"{module}.shuffled:ShuffledEstimator",
        summary="Another estimator's values in the wrong places: the control.",
    )
    register.allocator(
        "squeeze",
        f"{module}.squeeze:SqueezeAllocator",
        summary="Clusters of layers; the least important one gives entries to the others.",
        paper="arXiv:2404.04793",
    )
    register.allocator(
        "zigzag",
        f"{module}.zigzag:ZigZagAllocator",
        summary="A least budget for every layer, the rest by what it needs (reconstructed).",
        paper="arXiv:2412.09036",
    )
    register.allocator(
        "headkv",
        f"{module}.headkv:HeadKVAllocator",
        summary="A floor for every KV head, and a pool that is shared by score.",
        paper="arXiv:2410.19258",
    )
    register.policy(
        "kv_compress",
        f"{module}.kv_compress:KVCompressPolicy",
        summary="Keep what the prompt's last queries attend to, by squares.",
        paper="arXiv:2410.00161",
    )
    register.allocator(
        "kv_compress",
        f"{module}.kv_compress:KVCompressAllocator",
        summary="Keep the best scores of the prompt, whatever their layer and head, at run time.",
        paper="arXiv:2410.00161",
    )
    register.allocator(
        "same_count",
        f"{module}.same_count:SameCountAllocator",
        summary="By importance, but one count for the KV heads of a layer.",
    )
    register.policy(
        "expected_attention",
        f"{module}.expected_attention:ExpectedAttentionPolicy",
        summary="Keep what queries to come are expected to attend to.",
        paper="arXiv:2510.00636",
    )
    register.estimator(
        "sensitivity",
        f"{module}.sensitivity:SensitivityEstimator",
        summary="What the loss does when a KV head alone is shrunk, at several sizes.",
    )
    register.allocator(
        "power", f"{module}.power:PowerAllocator", summary="Shares by a power of the importance, over a floor."
    )
    register.allocator(
        "hull",
        f"{module}.hull:HullAllocator",
        summary="The next entry where measured curves fall most steeply (reconstructed).",
        paper="arXiv:2602.08585",
    )
    register.allocator(
        "learned",
        f"{module}.learned:LearnedAllocator",
        summary="Windows learned by gradient, so that the model predicts what its full cache does.",
    )
