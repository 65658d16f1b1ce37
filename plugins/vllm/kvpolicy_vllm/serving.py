"""What a plan says for one engine: the entries of each KV head in a block, and what the blocks are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from kvpolicy import BudgetError, BudgetPlan, ModelSpec, PlanError, PluginError, load_plan, registry
from kvpolicy_vllm.observation import Observation
from kvpolicy_vllm.settings import KEY, Settings

BLOCKS = (64, 128, 256, 512, 1024, 2048)
"""Tokens of a block where budgets grow with the length; the smallest that fits the plan is taken, but for `MOST`."""

MOST = 32
"""Blocks of a request that are better not exceeded, so that a head's entries are read in long runs."""

ROUNDING = 0.1
"""The most that a head's share of a block may be off, relative to the plan's."""


CONTENT_POLICIES = ("keydiff", "l2norm", "snapkv")
"""Those that score an entry by its key, which is in the block, or by the attention of the last queries, kept there."""

PERIODS = (16, 512)
"""The fewest and the most tokens from cut to cut under a content policy: about a quarter of the smallest capacity."""


@dataclass(frozen=True, slots=True)
class Serving:
    """It travels to vLLM's processes in the configuration, as JSON, so that the plan is read once.

    plan:             path of the plan file
    slots:            entries of each KV head in a block, [layers, KV heads] of the whole model
    tokens_per_block: tokens of a request that a block stands for; `max_model_len` for a slab
    num_sink_tokens:  first tokens, which stay
    max_model_len:    the most tokens of a request
    policy, policy_params: the plan's
    period:           tokens from cut to cut; 0 under a window rule
    window:           queries before a cut that are asked; 0 for none
    num_q_heads, head_dim: of a layer of the whole model
    layers:           those of the model that have a budget, in the order of `slots`
    window_block:     tokens of a block of the others, which have sliding windows in vLLM's own caches; 0 without others
    """

    plan: str
    slots: tuple[tuple[int, ...], ...]
    tokens_per_block: int
    num_sink_tokens: int
    max_model_len: int
    policy: str
    policy_params: dict[str, Any]
    period: int
    window: int
    num_q_heads: int
    head_dim: int
    layers: tuple[int, ...]
    window_block: int

    @classmethod
    def resolve(cls, settings: Settings, hf_config: Any, max_model_len: int, tp_size: int, block_size: int) -> Serving:
        """block_size: vLLM's own. Raises `BudgetError`, `PlanError` or `PluginError` in one line, each for its own."""
        plan = load_plan(settings.plan)
        spec = ModelSpec.from_config(hf_config)
        plan.check_model(spec)
        if any(level.formats for level in plan.levels):
            raise BudgetError(
                f"the plan {settings.plan} keeps entries in formats of fewer bits, which kvpolicy-vllm cannot serve: "
                "take a plan that was made without --format"
            )
        is_growing = settings.tokens is None and settings.context_length is None
        window_block = block_size if _is_hybrid(spec, is_growing) else 0
        table, tokens = (_growing if is_growing else _fixed)(plan, settings, max_model_len, tp_size)
        policy, least = plan.method.policy, int(table.min())
        period, window = _cuts(plan, least, is_growing)
        if period:
            table = table + period * (table >= max_model_len)  # a head that keeps everything is never cut
        if least <= plan.num_sink_tokens:
            raise BudgetError(
                f"max_model_len is {max_model_len}, which leaves a KV head {least} entries, no more than the "
                f"{plan.num_sink_tokens} sink tokens"
            )
        slots = tuple(tuple(row) for row in table.tolist())
        first = spec.layers[spec.budgeted_layers[0]]
        return cls(
            settings.plan, slots, tokens, plan.num_sink_tokens, max_model_len, policy.name, dict(policy.params), period,
            window, first.num_q_heads, first.key_dim, spec.budgeted_layers, window_block,
        )  # fmt: skip

    @classmethod
    def of(cls, vllm_config: Any) -> Serving | None:
        """What `resolve` left in the configuration; None where vLLM is to be left alone."""
        additional = vllm_config.additional_config
        if not isinstance(additional, Mapping) or KEY not in additional:
            return None
        value = additional[KEY]
        if set(value) != {field.name for field in fields(cls)}:
            raise BudgetError(
                f"additional_config.{KEY} was not resolved: the engine's configuration was not made by "
                "EngineArgs.create_engine_config, which kvpolicy-vllm needs"
            )
        slots = tuple(tuple(row) for row in value["slots"])
        return cls(**{**value, "slots": slots, "layers": tuple(value["layers"])})

    def to_json(self) -> dict[str, Any]:
        """For `of`."""
        return {**asdict(self), "slots": [list(row) for row in self.slots], "layers": list(self.layers)}

    @property
    def is_slab(self) -> bool:
        return self.tokens_per_block == self.max_model_len

    def rank_slots(self, layer: int, rank: int, tp_size: int) -> tuple[int, ...]:
        """Those of the KV heads that a tensor-parallel rank owns."""
        row = self.slots[layer]
        heads = len(row) // tp_size
        return row[rank * heads : (rank + 1) * heads]

    def rows(self, layer: int, tp_size: int) -> int:
        """Rows of a block: the most of any rank, because vLLM wants equal blocks on all of them.

        Beside sliding windows the most of any layer, and a multiple of the rows of their blocks: there vLLM wants equal
        blocks of all layers, and enlarges those of windows by a whole factor.
        """
        layers = range(len(self.slots)) if self.window_block else [layer]
        ranks = [self.rank_slots(one, rank, tp_size) for one in layers for rank in range(tp_size)]
        most = max(sum(slots) + self._observed(slots, tp_size) for slots in ranks)
        unit = max(1, self.window_block * len(ranks[0]))
        return -(-most // unit) * unit

    def _observed(self, slots: tuple[int, ...], tp_size: int) -> int:
        """Rows behind the entries of a rank's block."""
        if not self.window:
            return 0
        return Observation.size(slots, self.window, self.num_q_heads // tp_size, self.head_dim)

    def entries(self, tokens: int, tp_size: int) -> int:
        """Entries that a request of so many tokens takes the memory of, over all layers and ranks."""
        rows = sum(self.rows(layer, tp_size) for layer in range(len(self.slots)))
        return rows * tp_size * -(-tokens // self.tokens_per_block)


def _is_hybrid(spec: ModelSpec, is_growing: bool) -> bool:
    """Raises `BudgetError` for layers that cannot stand beside those with a budget."""
    others = sorted({layer.kind for layer in spec.layers if not layer.is_budgeted})
    if not others:
        return False
    count, full = len(spec.layers), len(spec.budgeted_layers)
    if others != ["sliding"] or full > count - full:
        raise BudgetError(
            f"the model has {count - full} layers without a budget ({', '.join(others)}) beside {full} with one; "
            "kvpolicy-vllm serves sliding windows, at least as many layers of them as others"
        )
    if not is_growing:
        raise BudgetError(
            "beside sliding windows capacities have to grow: vLLM's blocks are then of one size for all layers, and a "
            "window would take one as large as a slab. Give retention alone, without tokens= and context_length="
        )
    return True


def _cuts(plan: BudgetPlan, least: int, is_growing: bool) -> tuple[int, int]:
    """Tokens from cut to cut, 0 under a window rule, and queries that a cut asks. least: the smallest capacity."""
    choice = plan.method.policy
    policy = registry.create("policy", choice.name, choice.params)
    if policy.window_rule:
        return 0, 0
    if choice.name not in CONTENT_POLICIES:
        raise PluginError(
            f"the plan's policy '{choice.name}' scores entries by more than their keys and the attention of the last "
            f"queries; kvpolicy-vllm serves window rules, such as 'streaming', and {', '.join(CONTENT_POLICIES)}: tune "
            "a plan for one of them"
        )
    if is_growing:
        raise BudgetError(
            f"the plan's policy '{choice.name}' needs fixed capacities: give tokens= or context_length= as well"
        )
    period = 1 << max(0, (least // 4).bit_length() - 1)
    pinned = policy.num_sink_tokens + policy.recent_window
    if period < PERIODS[0] or least - period <= pinned:
        raise BudgetError(
            f"a KV head would have {least} entries, too few for the plan's policy '{choice.name}' with {pinned} sink "
            f"and recent tokens: it needs {4 * PERIODS[0]} at least, and a quarter more than those"
        )
    window = policy.observation_window if "window_attention" in policy.requires else 0
    if window > period:
        raise BudgetError(
            f"a KV head would have {least} entries, which are cut every {period} tokens, too few for the plan's policy "
            f"'{choice.name}' to ask {window} queries: it needs {4 * window} at least"
        )
    return min(period, PERIODS[1]), window


def _fixed(plan: BudgetPlan, settings: Settings, max_model_len: int, tp_size: int) -> tuple[Tensor, int]:
    """Entries of each KV head in a slab, and its tokens."""
    context = settings.context_length or plan.provenance.get("context_length") or max_model_len
    if settings.tokens is not None and settings.tokens > context:
        raise BudgetError(
            f"additional_config.{KEY}.tokens is {settings.tokens}, more than the {context} tokens that the plan was "
            "made on: give context_length besides"
        )
    table = plan.capacities(context, settings.retention, settings.tokens, tp_size)
    return table.clamp(max=max_model_len), max_model_len


def _growing(plan: BudgetPlan, settings: Settings, max_model_len: int, tp_size: int) -> tuple[Tensor, int]:
    """Entries of each KV head in a block, and the block's tokens."""
    if settings.retention is None:
        raise PlanError("retention is missing")
    shares = plan.shares_at(settings.retention)
    off = 0.0
    enough = [tokens for tokens in BLOCKS if tokens * MOST >= max_model_len] or list(BLOCKS[-1:])
    for tokens in enough:
        if tokens > max_model_len:
            break
        table = plan.capacities(tokens, settings.retention, tp_size=tp_size)
        off = float(((table / tokens - shares) / shares).abs().max())
        if off <= ROUNDING:
            return table, tokens
    raise BudgetError(
        f"no block of up to {min(max_model_len, BLOCKS[-1])} tokens holds the plan's smallest shares at retention "
        f"{settings.retention:g}: one would be off by {off:.0%}, where {ROUNDING:.0%} is the most. Give tokens= or "
        "context_length= for fixed capacities"
    )
