"""What decoding costs under several caches, on this machine: seconds, and bytes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.budget.entry_format import MODEL
from kvpolicy.cache.peak_memory import PeakMemory
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers.attention.attachment import attach, detach, is_attached
from kvpolicy.integrations.transformers.attention.exchange import text_config
from kvpolicy.integrations.transformers.cache.other_layers import tensors_of
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.cache.repeat import repeat_context
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.progress import Progress

MakeCache = Callable[[], Cache]
DENSE = "DynamicCache"
_WARM_UP = 64  # tokens of the prompt that are enough where nothing is compiled
_TO_RECORD = 2  # tokens on a GPU until a step is recorded; they are timed where there are no more


@dataclass(slots=True)
class DecodeCost:
    """One kind of cache. Figures are of each repeat, in order.

    first_token_seconds: from the prompt until the first token behind it is known
    token_seconds:   of one decoded token, the mean over a repeat's; on a GPU without the two that recording takes
    peaks:           most bytes above what was in use before, activations included; None where nobody knows
    bytes:           that the cache holds at the end, all of its tensors
    entries, entries_seen: of the budgeted layers; equal for a stock cache
    entry_format:    the name of the entries' format
    decoding, why:   "graph" where the last token was a replay, else "eager", and the reason if one is told
    """

    name: str
    first_token_seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    bytes: int = 0
    entries: int = 0
    entries_seen: int = 0
    entry_format: str = MODEL
    decoding: str = "eager"
    why: str | None = None

    @property
    def median_token_seconds(self) -> float:
        return statistics.median(self.token_seconds)

    @property
    def median_first_token_seconds(self) -> float:
        return statistics.median(self.first_token_seconds)

    @property
    def peak_bytes(self) -> int | None:
        """The largest peak of those that are known."""
        return max((peak for peak in self.peaks if peak is not None), default=None)

    def add_repeat(self, first_token_seconds: float, token_seconds: float, peak: int | None, cache: Any) -> None:
        self.first_token_seconds.append(first_token_seconds)
        self.token_seconds.append(token_seconds)
        self.peaks.append(peak)
        if isinstance(cache, RaggedCache):
            report = cache.report()
            self.bytes, self.entries, self.entries_seen = cache.nbytes, sum(report.entries), sum(report.full)
            self.entry_format = report.entry_format
            self.decoding, self.why = cache.replays.mode or "eager", cache.replays.why
        else:
            self.bytes = sum(tensor.nbytes for layer in cache.layers for tensor in tensors_of(layer).values())

    def token_ratio(self, other: DecodeCost) -> float:
        """`median_token_seconds` over that of `other`."""
        return self.median_token_seconds / other.median_token_seconds

    def first_token_ratio(self, other: DecodeCost) -> float:
        """As `token_ratio`, for the first token."""
        return self.median_first_token_seconds / other.median_first_token_seconds


def measure_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    make_caches: Mapping[str, MakeCache],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> list[DecodeCost]:
    """The cost of a stock `DynamicCache` on the model as it is, and of each of `make_caches`, in this order.

    input_ids:   int64 [B, n + new_tokens]: the prompt, and the tokens that are fed one by one behind it. All caches
        are fed the same ones, whatever the model would have said
    make_caches: by name, what makes an empty cache
    repeats:     the caches take turns within a repeat, and who begins moves on, so that a drift of the machine's speed
        hits all of them
    tokenizer:   for caches whose policy has the context repeated; the time of that is the prompt's

    Raises `BudgetError` for an input without a prompt. Afterwards the model is attached, or not, as before.
    """
    check_token_ids(model, input_ids)
    prompt = input_ids.shape[1] - new_tokens
    if prompt < 1 or new_tokens < 1:
        raise BudgetError(f"{input_ids.shape[1]} tokens hold no prompt and {new_tokens} tokens to decode")
    makers: dict[str, MakeCache] = {DENSE: lambda: DynamicCache(config=text_config(model)), **make_caches}
    ids, was_attached = input_ids.to(model.device), is_attached(model)
    costs = [DecodeCost(name) for name in makers]
    progress = progress or Progress()
    progress.begin("bench", repeats * len(costs))
    try:
        warm_up = prompt if ids.device.type == "cuda" else min(prompt, _WARM_UP)
        for make in makers.values():
            _run(model, ids[:, : warm_up + 2], warm_up, make, DecodeCost(""), tokenizer)
        for repeat in range(repeats):
            turn = repeat % len(costs)
            for cost in [*costs[turn:], *costs[:turn]]:
                _run(model, ids, prompt, makers[cost.name], cost, tokenizer)
                progress.advance(f"{cost.name}: {1e3 * cost.token_seconds[-1]:.1f} ms a token")
    finally:
        progress.end()
        (attach if was_attached else detach)(model)
    return costs


@torch.inference_mode()
def _run(
    model: PreTrainedModel,
    ids: Tensor,
    prompt: int,
    make: MakeCache,
    cost: DecodeCost,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """One prompt and its tokens; adds to `cost`."""
    cache = make()
    (attach if isinstance(cache, RaggedCache) else detach)(model)
    gc.collect()
    peak, begun = PeakMemory(ids.device, fresh=True), seconds_now(ids)
    out = model(ids[:, :prompt], **with_cache(model, cache), use_cache=True, **keep_logits(model))
    if isinstance(cache, RaggedCache) and cache.awaits_repeat and tokenizer is not None:  # without, decoding refuses
        repeat_context(model, cache, ids[:, :prompt], tokenizer)
    out.logits[:, -1].argmax(-1).tolist()
    known = decoding = seconds_now(ids)
    del out
    count = ids.shape[1] - prompt
    untimed = _TO_RECORD if ids.device.type == "cuda" and count > _TO_RECORD else 0
    for step in range(count):
        if step == untimed:
            decoding = seconds_now(ids)
        model(ids[:, prompt + step : prompt + step + 1], **with_cache(model, cache), use_cache=True)
    ended = seconds_now(ids)
    cost.add_repeat(known - begun, (ended - decoding) / (count - untimed), peak.measure(), cache)


def seconds_now(ids: Tensor) -> float:
    """Seconds, once everything that was launched on the device of `ids` is done."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()
