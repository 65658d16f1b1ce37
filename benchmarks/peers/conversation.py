"""One conversation over any cache: the context, a question, the answer, a second question. Needs torch and transformers
alone, so that it runs in the environment of every peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Prompt:
    """Tokens of a context and of a question about it, and the text that a right answer holds."""

    context: list[int]
    question: list[int]
    answer: str


@dataclass(frozen=True)
class Peer:
    """A way to hold the context.

    prefill:   token ids [B, n] and a mask -> the cache, and the logits behind each row
    held:      bytes of a cache on the model's device, everything it holds
    using:     entered around a whole conversation
    elsewhere: bytes of a cache in other memory
    """

    tool: str
    method: str
    kept: float
    prefill: Callable[[Tensor, Tensor | None], tuple[Any, Tensor]]
    held: Callable[[Any], int]
    using: Callable[[], AbstractContextManager[Any]]
    cache_name: str = "past_key_values"
    elsewhere: Callable[[Any], int] = lambda cache: 0


@torch.no_grad()
def measured(peer: Peer, model: Any, tokenizer: Any, prompts: Sequence[Prompt], new_tokens: int) -> dict[str, Any]:
    """Means over the prompts, each alone, and medians of times; what the first context takes at its peak; and whether a
    left-padded batch of the first two gives the same tokens.
    """
    first, second, weights, others, begun, steps = [], [], [], [], [], []
    with peer.using():
        for prompt in prompts:
            start = _now(model)
            cache, _ = peer.prefill(torch.tensor([prompt.context], device=model.device), None)
            weights.append(peer.held(cache))
            others.append(peer.elsewhere(cache))
            talk = Talk(peer, model, cache, len(prompt.context))
            said = talk.answer(prompt.question, new_tokens)
            begun.append(talk.times[0] - start)
            steps += [later - earlier for earlier, later in pairwise(talk.times)]
            first.append(prompt.answer in tokenizer.decode(said))
            second.append(prompt.answer in tokenizer.decode(talk.answer(prompt.question, new_tokens)))
        context = torch.tensor([prompts[0].context], device=model.device)
        peak = peak_bytes(model, lambda: peer.prefill(context, None))
        padded = _padded(peer, model, prompts[:2], new_tokens)
    row = {"n": len(prompts), "score": _mean(first), "second_turn": _mean(second), "bytes": _mean(weights)}
    row |= {"bytes_elsewhere": _mean(others), "peak_bytes": peak, "padded_batch": padded}
    return row | {"first_token_seconds": median(begun), "ms_a_token": 1e3 * median(steps)}


class Talk:
    """Questions and greedy answers behind a context. Positions go on as if nothing had been evicted.

    times: when each token of the last answer was there
    """

    def __init__(self, peer: Peer, model: Any, cache: Any, seen: int) -> None:
        self.peer, self.model, self.cache, self.seen = peer, model, cache, seen
        self.unfed: list[int] = []
        self.times: list[float] = []

    def answer(self, question: Sequence[int], count: int) -> list[int]:
        """`count` tokens behind a question, none of which ends it: all peers do the same work."""
        self.times = []
        said = [self._fed([*self.unfed, *question])]
        while len(said) < count:
            said.append(self._fed(said[-1:]))
        self.unfed = said[-1:]
        return said

    def _fed(self, ids: Sequence[int]) -> int:
        places = torch.arange(self.seen, self.seen + len(ids), device=self.model.device)[None]
        self.seen += len(ids)
        given = {self.peer.cache_name: self.cache, "position_ids": places}
        logits = self.model(torch.tensor([ids], device=self.model.device), **given, use_cache=True).logits
        token = int(logits[0, -1].argmax())
        self.times.append(_now(self.model))
        return token


def peak_bytes(model: Any, work: Callable[[], Any]) -> int:
    """The most that tensors take during the work, beyond what was there before."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def _padded(peer: Peer, model: Any, prompts: Sequence[Prompt], new_tokens: int) -> str:
    """What becomes of two prompts of different lengths in one batch: "equal", "differs", or the error."""
    texts = [[*prompt.context[7 * index :], *prompt.question] for index, prompt in enumerate(prompts)]
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts], device=model.device)
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts], device=model.device)
    try:
        together = _greedy(peer, model, ids, mask, new_tokens)
        apart = [_greedy(peer, model, torch.tensor([text], device=model.device), None, new_tokens)[0] for text in texts]
    except Exception as error:
        return message(error)
    return "equal" if together == apart else "differs"


def _greedy(peer: Peer, model: Any, ids: Tensor, mask: Tensor | None, count: int) -> list[list[int]]:
    """Tokens behind whole prompts, question included, of each row."""
    cache, logits = peer.prefill(ids, mask)
    whole = torch.ones_like(ids) if mask is None else mask
    said = [logits[:, -1].argmax(-1)]
    for _ in range(count - 1):
        whole = torch.cat([whole, torch.ones_like(whole[:, :1])], 1)
        given = {peer.cache_name: cache, "position_ids": whole.sum(1, keepdim=True) - 1}
        if mask is not None:
            given["attention_mask"] = whole
        said.append(model(said[-1][:, None], **given, use_cache=True).logits[:, -1].argmax(-1))
    return torch.stack(said, 1).tolist()


def positions(mask: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward over left-padded rows."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor inside a cache, those of quantized tensors too."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name), seen)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, seen)


def stock_bytes(cache: Any, device: torch.device, elsewhere: bool = False) -> int:
    """Of all tensors that the layers of a cache of transformers hold on a device, or elsewhere; shared memory once."""
    tensors = [tensor for layer in cache.layers for tensor in tensors_in(vars(layer))]
    storages = [tensor.untyped_storage() for tensor in tensors if (tensor.device != device) is elsewhere]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def message(error: Exception) -> str:
    """A failure in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _now(model: Any) -> float:
    """Seconds; on a CPU those of this process alone, all threads together, whatever else the machine does."""
    if model.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
