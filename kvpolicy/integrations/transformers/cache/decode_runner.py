"""Decoding as one CUDA graph a token: for custom loops, and for whoever waits for tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.cache.static import PLAN_INTERVAL
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import GraphWarning, ModelError
from kvpolicy.integrations.transformers.attention.attachment import attach
from kvpolicy.integrations.transformers.cache.parallel import rank_and_size
from kvpolicy.integrations.transformers.cache.static_cache import StaticRaggedCache
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.model.spec import ModelSpec

_WARM_UP = 3  # steps before a capture: kernels are compiled and workspaces allocated in them


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row. logits: [B, vocabulary]. Returns int64 [B]."""
    return logits.argmax(-1)


class DecodeRunner:
    """Runs a model token by token over a static cache, each token one replay of a CUDA graph.

        cache = kvpolicy.new_cache(model, plan, retention=0.3, context_length=32768, static=True)
        runner = kvpolicy.DecodeRunner(model, cache)
        logits = runner.prefill(prompt)        # as often as there are prompts
        logits = runner.step(logits.argmax(-1))

    model, cache: a cache of `new_cache(model, ..., static=True)`, which the runner has to itself
    compiled: whether `torch.compile` fuses the model's small operations first. It takes a minute for a large model,
        and without it a token takes up to twice as long

    The graph is captured before the first prompt and serves all that follow, of any length.

    mode: "graph", or "eager" where a graph is not possible: not on CUDA, layers on several devices, layers with a
        sliding window, an operation that cannot be captured. A `GraphWarning` says why, and `why` keeps it.

    Raises `ModelError` for a cache that is not static, and for one that another kind of model was given.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticRaggedCache, *, compiled: bool = True) -> None:
        if not isinstance(cache, StaticRaggedCache):
            raise ModelError(
                "DecodeRunner needs a static cache: new_cache(model, ..., context_length=..., static=True)"
            )
        if ModelSpec.from_config(model.config) != cache.spec:
            raise ModelError(
                "the cache was made for a model of other layers or heads: new_cache(model, ..., static=True) with the "
                "model that the runner is for"
            )
        self.model, self.cache, self.compiled = model, cache, compiled
        self.mode: Literal["graph", "eager"] = "eager"
        self.why: str | None = None
        self._prepared = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prompt: RaggedStore | None = None  # that came from here

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Forgets what was there and reads a prompt. input_ids: int64 [B, n]; attention_mask: [B, n], for left padding.

        Returns the logits of the last token, [B, vocabulary]. Raises `ModelError` for other shapes, and for a mask that
        hides anything but the first tokens of a row.
        """
        check_token_ids(self.model, input_ids)
        mask = _checked(input_ids, attention_mask)
        if not self._prepared:  # before the prompt, which a capture would overwrite
            self._prepare(input_ids.shape[0])
        attach(self.model)
        self.cache.reset()
        # a model counts positions from the first column, padding or not; only generate counts them by the mask
        position_ids = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0).to(self.model.device)
        out = self.model(
            input_ids.to(self.model.device),
            attention_mask=None if mask is None else mask.to(self.model.device),
            position_ids=position_ids,
            **with_cache(self.model, self.cache),
            use_cache=True,
            **keep_logits(self.model),
        )
        self._prompt = self.cache.store
        logits: Tensor = out.logits[:, -1]
        return logits

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Feeds one token a row. token_ids: int64 [B] or [B, 1].

        Returns its logits, [B, vocabulary], which the next step overwrites. Raises `ModelError` before a prompt, for
        another number of tokens, where a step broke off or another prompt came into the cache, and `BudgetError` where
        everything is kept and no room is left.
        """
        if not self._prepared or not self.cache.decoding:
            raise ModelError("no prompt has come yet: prefill() first")
        if self.cache.store is not self._prompt:
            raise ModelError("the cache holds a prompt that did not come from this runner: prefill() first")
        static = self.cache.check_whole()
        if token_ids.numel() != len(self._ids):
            raise ModelError(f"a step takes one token for each of {len(self._ids)} rows, got {list(token_ids.shape)}")
        self._ids.copy_(token_ids.reshape_as(self._ids))
        if 0 < static.decoded <= static.growth + PLAN_INTERVAL and static.decoded % PLAN_INTERVAL == 0:
            static.replan()  # the work is shared by lengths, which still grow
        if self._graph is None:
            return self._forward(self.model)
        static.count()  # on the host, which a replay does not touch
        self._graph.replay()
        return self._logits

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        select: Callable[[Tensor], Tensor] = greedy,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Tensor:
        """A prompt and what follows it. input_ids: int64 [B, n].

        select: logits [B, vocabulary] to tokens int64 [B]
        eos_token_id: ends a row; it, or the first of several, is repeated behind the end until all rows have ended

        Returns int64 [B, n + generated].
        """
        logits, ids = self.prefill(input_ids, attention_mask), [input_ids.to(self.model.device)]
        ends = [] if eos_token_id is None else torch.tensor(eos_token_id).flatten().tolist()
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=self.model.device)
        for left in range(max_new_tokens, 0, -1):
            token = select(logits)
            if ends:
                token = token.masked_fill(ended, ends[0])
                ended = ended | torch.isin(token, torch.tensor(ends, device=token.device))
            ids.append(token[:, None])
            if left == 1 or (ends and bool(ended.all())):
                break
            logits = self.step(token)
        return torch.cat(ids, 1)

    def _prepare(self, batch_size: int) -> None:
        """Sets memory aside, and captures a step over an empty cache."""
        model, cache, spec = self.model, self.cache, self.cache.spec
        heads = spec.num_kv_heads // rank_and_size(model, spec)[1]
        attach(model)
        cache.reset()
        cache.begin(torch.empty(batch_size, heads, 1, spec.attention.key_dim, dtype=model.dtype, device=model.device))
        # at an address that stays: the graph reads it
        self._ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        devices = {parameter.device for parameter in model.parameters()}
        if model.device.type != "cuda":
            self._fall_back(f"the model is on {model.device}, CUDA graphs need a CUDA device")
        elif len(devices) > 1:
            self._fall_back(f"the model lies on {len(devices)} devices, a CUDA graph on one")
        elif any(cache.is_sliding):
            self._fall_back("layers with a sliding window count their tokens in Python, which a graph would not do")
        else:
            self._capture()
        self._prepared = True  # not where it broke off: the next prompt tries again

    def _capture(self) -> None:
        forwards: list[Callable[..., Any]] = [self.model]
        if self.compiled:
            forwards.insert(0, torch.compile(self.model.forward, dynamic=False, mode="max-autotune-no-cudagraphs"))
        for forward in forwards:
            self.cache.rehearse()  # again, where the way before broke off in the middle of a step
            try:
                self._graph = self._captured(forward)
            except Exception as error:  # whatever a compiler or the capture raises; the next way is slower, not wrong
                lost = "torch.compile" if forward is not self.model else "a CUDA graph"
                self._fall_back(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", lost)
            else:
                self.mode = "graph"
                return

    def _captured(self, forward: Callable[..., Any]) -> torch.cuda.CUDAGraph:
        # torch wants what comes before a capture on another stream than the current one
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # of torch
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(self.model)  # layers of other kinds set their memory aside, which a compiler would trace
            for _ in range(_WARM_UP):
                self._forward(forward)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._forward(forward)
        return graph

    def _forward(self, forward: Callable[..., Any]) -> Tensor:
        """One token a row, from `_ids`, behind what the store has seen: whatever came between, positions are right."""
        own, positions = with_cache(self.model, self.cache), self.cache.opened_static().seen[:, None]
        out = forward(input_ids=self._ids, position_ids=positions, **own, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _fall_back(self, why: str, lost: str = "a CUDA graph") -> None:
        self.why = why
        warnings.warn(f"decoding runs without {lost}, and slower: {why}", GraphWarning, stacklevel=4)


def _checked(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask of a prompt, None where nothing is hidden. Raises `ModelError` for what `prefill` cannot take."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ModelError(f"a prompt is tokens [B, n] with n of at least 1, got {list(input_ids.shape)}")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ModelError(
            f"attention_mask must have the prompt's shape, {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    shown = attention_mask.bool()
    if not bool(shown[:, -1].all()) or bool((shown[:, 1:] < shown[:, :-1]).any()):
        raise ModelError(
            "attention_mask hides tokens behind a row's first one: the runner takes padding on the left alone, set "
            "tokenizer.padding_side = 'left'"
        )
    return None if bool(shown.all()) else attention_mask
