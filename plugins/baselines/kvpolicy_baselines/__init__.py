"""Baselines: what every method is compared with. A method is one file here and one row of its table."""

from __future__ import annotations

from kvpolicy import Register, hookimpl

# name, module:class, what it does, where it is from
ESTIMATORS = [
    ("uniform", "uniform:UniformEstimator", "Every KV head matters alike.", ""),
    (
        "layer_cosine",
        "layer_cosine:LayerCosineEstimator",
        "How much attention turns the residual stream, layer by layer.",
        "arXiv:2404.04793",
    ),
    (
        "entropy",
        "entropy:EntropyEstimator",
        "How many entries a KV head needs to keep most of its attention (reconstructed).",
        "arXiv:2412.09036",
    ),
    (
        "retrieval",
        "retrieval:RetrievalEstimator",
        "How much a KV head looks at the answer, in prompts with a needle.",
        "arXiv:2410.19258",
    ),
    ("shuffled", "shuffled:ShuffledEstimator", "Another estimator's values in the wrong places: the control.", ""),
    (
        "sensitivity",
        "sensitivity:SensitivityEstimator",
        "What the loss does when a KV head alone is shrunk, at several sizes.",
        "",
    ),
]
ALLOCATORS = [
    ("uniform", "uniform:UniformAllocator", "The same capacity for every KV head.", ""),
    (
        "pyramid",
        "pyramid:PyramidAllocator",
        "More entries for the first layers, fewer for the last.",
        "arXiv:2406.02069",
    ),
    (
        "adakv",
        "adakv:AdaKVAllocator",
        "Split each layer's budget by the prompt's best scores, at run time.",
        "arXiv:2407.11550",
    ),
    (
        "squeeze",
        "squeeze:SqueezeAllocator",
        "Clusters of layers; the least important one gives entries to the others.",
        "arXiv:2404.04793",
    ),
    (
        "zigzag",
        "zigzag:ZigZagAllocator",
        "A least budget for every layer, the rest by what it needs (reconstructed).",
        "arXiv:2412.09036",
    ),
    (
        "headkv",
        "headkv:HeadKVAllocator",
        "A floor for every KV head, and a pool that is shared by score.",
        "arXiv:2410.19258",
    ),
    (
        "kv_compress",
        "kv_compress:KVCompressAllocator",
        "Keep the best scores of the prompt, whatever their layer and head, at run time.",
        "arXiv:2410.00161",
    ),
    ("same_count", "same_count:SameCountAllocator", "By importance, but one count for the KV heads of a layer.", ""),
    ("power", "power:PowerAllocator", "Shares by a power of the importance, over a floor.", ""),
    (
        "hull",
        "hull:HullAllocator",
        "The next entry where measured curves fall most steeply (reconstructed).",
        "arXiv:2602.08585",
    ),
    (
        "learned",
        "learned:LearnedAllocator",
        "Windows learned by gradient, so that the model predicts what its full cache does.",
        "",
    ),
]
POLICIES = [
    ("streaming", "streaming:StreamingPolicy", "Keep the first tokens and the most recent ones.", "arXiv:2309.17453"),
    (
        "h2o",
        "h2o:H2OPolicy",
        "Keep what all queries so far have attended to most, and the most recent.",
        "arXiv:2306.14048",
    ),
    (
        "snapkv",
        "snapkv:SnapKVPolicy",
        "Keep what the prompt's last queries attend to, in clusters.",
        "arXiv:2404.14469",
    ),
    ("tova", "tova:TOVAPolicy", "Keep what the last query attends to.", "arXiv:2401.06104"),
    ("l2norm", "l2norm:L2NormPolicy", "Keep the entries with the shortest keys.", "arXiv:2406.11430"),
    ("keydiff", "keydiff:KeyDiffPolicy", "Keep the entries whose keys are unlike the others.", "arXiv:2504.15364"),
    ("random", "random:RandomPolicy", "Keep entries at random: the control.", ""),
    ("corm", "corm:CORMPolicy", "Keep what recent queries found important.", "arXiv:2404.15949"),
    ("r_kv", "r_kv:RKVPolicy", "Keep what is attended to and not said twice, for long output.", "arXiv:2505.24133"),
    ("kvzip", "kvzip:KVzipPolicy", "Keep what the model looks at when it repeats its context.", "arXiv:2505.23416"),
    (
        "kv_compress",
        "kv_compress:KVCompressPolicy",
        "Keep what the prompt's last queries attend to, by squares.",
        "arXiv:2410.00161",
    ),
    (
        "expected_attention",
        "expected_attention:ExpectedAttentionPolicy",
        "Keep what queries to come are expected to attend to.",
        "arXiv:2510.00636",
    ),
]


@hookimpl
def kvpolicy_register(register: Register) -> None:
    for offer, rows in (
        (register.estimator, ESTIMATORS),
        (register.allocator, ALLOCATORS),
        (register.policy, POLICIES),
    ):
        for name, target, summary, paper in rows:
            offer(name, f"kvpolicy_baselines.{target}", summary=summary, paper=paper)
