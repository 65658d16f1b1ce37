"""Baselines: what every method is compared with. A method is one file here and one row of its table."""

from __future__ import annotations

from kvpolicy import Register, hookimpl

# name, module:class, what it does, where it is from, when to use it
ESTIMATORS = [
    (
        "uniform",
        "uniform:UniformEstimator",
        "Every KV head matters alike.",
        "",
        "With an allocator that measures for itself, such as learned.",
    ),
    (
        "layer_cosine",
        "layer_cosine:LayerCosineEstimator",
        "How much attention turns the residual stream, layer by layer.",
        "arXiv:2404.04793",
        "With the allocator squeeze.",
    ),
    (
        "entropy",
        "entropy:EntropyEstimator",
        "How many entries a KV head needs to keep most of its attention (reconstructed).",
        "arXiv:2412.09036",
        "With the allocator zigzag.",
    ),
    (
        "retrieval",
        "retrieval:RetrievalEstimator",
        "How much a KV head looks at the answer, in prompts with a needle.",
        "arXiv:2410.19258",
        "With the allocator headkv; prompts must have room for a needle.",
    ),
    (
        "shuffled",
        "shuffled:ShuffledEstimator",
        "Another estimator's values in the wrong places: the control.",
        "",
        "As a control: does it matter which KV heads get more?",
    ),
    (
        "sensitivity",
        "sensitivity:SensitivityEstimator",
        "What the loss does when a KV head alone is shrunk, at several sizes.",
        "",
        "With the allocator power, where measured budgets are worth hundreds of forwards.",
    ),
    (
        "fisher",
        "fisher:FisherEstimator",
        "The divergence that each capacity of a KV head costs, from one backward pass a sequence.",
        "",
        "With the allocator hull behind a prompt, where learning takes too long.",
    ),
]
ALLOCATORS = [
    (
        "uniform",
        "uniform:UniformAllocator",
        "The same capacity for every KV head.",
        "",
        "To begin with; every other split is compared with it.",
    ),
    (
        "pyramid",
        "pyramid:PyramidAllocator",
        "More entries for the first layers, fewer for the last.",
        "arXiv:2406.02069",
        "To compare with PyramidKV; uniform budgets found more pass keys.",
    ),
    (
        "adakv",
        "adakv:AdaKVAllocator",
        "Split each layer's budget by the prompt's best scores, at run time.",
        "arXiv:2407.11550",
        "Without a plan, where prompts differ much; compare it with uniform first.",
    ),
    (
        "squeeze",
        "squeeze:SqueezeAllocator",
        "Clusters of layers; the least important one gives entries to the others.",
        "arXiv:2404.04793",
        "With the estimator layer_cosine, to compare with SqueezeAttention.",
    ),
    (
        "zigzag",
        "zigzag:ZigZagAllocator",
        "A least budget for every layer, the rest by what it needs (reconstructed).",
        "arXiv:2412.09036",
        "With the estimator entropy, to compare with ZigZagKV.",
    ),
    (
        "headkv",
        "headkv:HeadKVAllocator",
        "A floor for every KV head, and a pool that is shared by score.",
        "arXiv:2410.19258",
        "With the estimator retrieval, to compare with HeadKV.",
    ),
    (
        "kv_compress",
        "kv_compress:KVCompressAllocator",
        "Keep the best scores of the prompt, whatever their layer and head, at run time.",
        "arXiv:2410.00161",
        "Under the policy of its name, without a plan, at 30 % kept or less.",
    ),
    (
        "cake",
        "cake:CAKEAllocator",
        "More entries for layers whose attention is spread and shifts, at run time.",
        "arXiv:2503.12491",
        "For budgets that follow each prompt by layers, under any policy.",
    ),
    (
        "same_count",
        "same_count:SameCountAllocator",
        "By importance, but one count for the KV heads of a layer.",
        "",
        "As a control: what are counts per head worth beyond counts per layer?",
    ),
    (
        "power",
        "power:PowerAllocator",
        "Shares by a power of the importance, over a floor.",
        "",
        "With the estimator sensitivity, where learning takes too long.",
    ),
    (
        "hull",
        "hull:HullAllocator",
        "The next entry where measured curves fall most steeply (reconstructed).",
        "arXiv:2602.08585",
        "With the curves of sensitivity; power did better on eight sequences.",
    ),
    (
        "learned",
        "learned:LearnedAllocator",
        "Windows learned by gradient, so that the model predicts what its full cache does.",
        "",
        "For the best budgets measured so far; takes minutes a level on a GPU.",
    ),
]
POLICIES = [
    (
        "streaming",
        "streaming:StreamingPolicy",
        "Keep the first tokens and the most recent ones.",
        "arXiv:2309.17453",
        "For long streams whose far past does not matter; the fastest to run and to tune for.",
    ),
    (
        "h2o",
        "h2o:H2OPolicy",
        "Keep what all queries so far have attended to most, and the most recent.",
        "arXiv:2306.14048",
        "For low perplexity with few entries; it loses single facts.",
    ),
    (
        "snapkv",
        "snapkv:SnapKVPolicy",
        "Keep what the prompt's last queries attend to, in clusters.",
        "arXiv:2404.14469",
        "For a question at the end of a long prompt; the first choice with learned budgets.",
    ),
    (
        "tova",
        "tova:TOVAPolicy",
        "Keep what the last query attends to.",
        "arXiv:2401.06104",
        "For long answers: every decoded token asks again.",
    ),
    (
        "l2norm",
        "l2norm:L2NormPolicy",
        "Keep the entries with the shortest keys.",
        "arXiv:2406.11430",
        "Where no attention is to be computed; others lose less.",
    ),
    (
        "keydiff",
        "keydiff:KeyDiffPolicy",
        "Keep the entries whose keys are unlike the others.",
        "arXiv:2504.15364",
        "Where no attention is to be computed, and facts must stay.",
    ),
    (
        "random",
        "random:RandomPolicy",
        "Keep entries at random: the control.",
        "",
        "As a control: a policy that does not beat it has learned nothing about entries.",
    ),
    (
        "corm",
        "corm:CORMPolicy",
        "Keep what recent queries found important.",
        "arXiv:2404.15949",
        "For facts; with 10 % kept or less its perplexity suffers most.",
    ),
    (
        "r_kv",
        "r_kv:RKVPolicy",
        "Keep what is attended to and not said twice, for long output.",
        "arXiv:2505.24133",
        "For long answers that repeat themselves, as those of reasoning models.",
    ),
    (
        "kvzip",
        "kvzip:KVzipPolicy",
        "Keep what the model looks at when it repeats its context.",
        "arXiv:2505.23416",
        "For one document and many questions; costs a second prefill.",
    ),
    (
        "kv_compress",
        "kv_compress:KVCompressPolicy",
        "Keep what the prompt's last queries attend to, by squares.",
        "arXiv:2410.00161",
        "With the allocator of its name: budgets that follow each prompt.",
    ),
    (
        "expected_attention",
        "expected_attention:ExpectedAttentionPolicy",
        "Keep what queries to come are expected to attend to.",
        "arXiv:2510.00636",
        "For questions that are not in the prompt yet.",
    ),
    (
        "critical_kv",
        "critical_kv:CriticalKVPolicy",
        "Keep half by another policy's scores, half by these times what a value writes.",
        "arXiv:2502.03805",
        "Around snapkv and others that score the prompt by attention.",
    ),
]

# the same, with the whole address: the core has the tasks
TASKS = [
    (
        "passkey",
        "kvpolicy.tasks.recalled_number:PasskeyTask",
        "A number that stands somewhere in repeated filler.",
        "arXiv:2305.16300",
        "To see whether anything is found at all.",
    ),
    (
        "key-value",
        "kvpolicy.tasks.recalled_number:KeyValueTask",
        "The number of one item among many.",
        "arXiv:2307.03172",
        "Harder than a pass key: nothing in the prompt stands out.",
    ),
    (
        "needle-grid",
        "kvpolicy.tasks.needle_grid:NeedleGridTask",
        "A number in filler, at every depth of several lengths.",
        "",
        "For a picture of what is found where.",
    ),
    (
        "ruler",
        "kvpolicy.tasks.ruler:RulerTask",
        "RULER: needles, variables, word counts; documents from its own files.",
        "arXiv:2404.06654",
        "As the first benchmark; six of its 13 tasks need no files.",
    ),
    (
        "longbench",
        "kvpolicy.tasks.longbench:LongBenchTask",
        "LongBench v1, English and code, from local files.",
        "arXiv:2308.14508",
        "For questions and summaries of real documents.",
    ),
    (
        "scbench",
        "kvpolicy.tasks.scbench:SCBenchTask",
        "SCBench: several questions in turn about one context.",
        "arXiv:2412.10319",
        "For a context that is compressed once and used again.",
    ),
    (
        "babilong",
        "kvpolicy.tasks.babilong:BABILongTask",
        "BABILong: facts between the sentences of books, from local files.",
        "arXiv:2406.10149",
        "For a little reasoning over what is found.",
    ),
    (
        "file",
        "kvpolicy.tasks.own_file:FileTask",
        "Questions of a JSONL file of your own.",
        "",
        "With --task-file.",
    ),
]


@hookimpl
def kvpolicy_register(register: Register) -> None:
    for offer, rows in (
        (register.estimator, ESTIMATORS),
        (register.allocator, ALLOCATORS),
        (register.policy, POLICIES),
    ):
        for name, target, summary, paper, when in rows:
            offer(name, f"kvpolicy_baselines.{target}", summary=summary, paper=paper, when=when)
    for name, target, summary, paper, when in TASKS:
        register.task(name, target, summary=summary, paper=paper, when=when)
