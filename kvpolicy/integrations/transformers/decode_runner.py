"""Decoding as one CUDA graph a token: for custom loops, and for whoever waits for tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.cache.static import PLAN_INTERVAL
from kvpolicy.errors import BudgetError, GraphWarning, ModelError
from kvpolicy.integrations.transformers.attachment import attach
from kvpolicy.integrations.transformers.parallel import rank_and_size
from kvpolicy.integrations.transformers.static_cache import StaticRaggedCache
from kvpolicy.integrations.transformers.versions import with_cache

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

    Raises `ModelError` for a cache that is not static.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticRaggedCache, *, compiled: bool = True) -> None:
        if not isinstance(cache, StaticRaggedCache):
            raise ModelError(
                "DecodeRunner needs a static cache: new_cache(model, ..., context_length=..., static=True)"
            )
        self.model, self.cache, self.compiled = model, cache, compiled
        self.mode: Literal["graph", "eager"] = "eager"
        self.why: str | None = None
        self._prepared = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Forgets what was there and reads a prompt. input_ids: int64 [B, n]; attention_mask: [B, n], for left padding.

        Returns the logits of the last token, [B, vocabulary].
        """
        if not self._prepared:
            self._prepare(input_ids.shape[0])
        attach(self.model)
        self.cache.reset()
        position_ids = None if attention_mask is None else (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        out = self.model(
            input_ids.to(self.model.device),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **with_cache(self.model, self.cache),
            use_cache=True,
            **last,
        )
        self._positions.copy_(self.cache.opened_static().seen[:, None])
        self._steps = 0
        logits: Tensor = out.logits[:, -1]
        return logits

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Feeds one token a row. token_ids: int64 [B] or [B, 1].

        Returns its logits, [B, vocabulary], which the next step overwrites. Raises `ModelError` before a prompt and for
        another number of tokens, `BudgetError` where everything is kept and no room is left.
        """
        if not self._prepared or not self.cache.decoding:
            raise ModelError("no prompt has come yet: prefill() first")
        static, seen = self.cache.opened_static(), self.cache.budgeted[0].columns + self._steps
        if token_ids.numel() != len(self._ids):
            raise ModelError(f"a step takes one token for each of {len(self._ids)} rows, got {list(token_ids.shape)}")
        if seen >= self.cache.context_length and not self.cache.opened().schedule.evicts:
            raise BudgetError(
                f"everything is kept (retention 1), and there is room for {self.cache.context_length} tokens: make the "
                "cache with a larger context_length"
            )
        self._ids.copy_(token_ids.reshape_as(self._ids))
        if 0 < self._steps <= static.growth + PLAN_INTERVAL and self._steps % PLAN_INTERVAL == 0:
            static.replan()
        self._steps += 1
        if self._graph is None:
            return self._forward(self.model)
        self._graph.replay()
        return self._logits

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        select: Callable[[Tensor], Tensor] = greedy,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """A prompt and what follows it. input_ids: int64 [B, n].

        select: logits [B, vocabulary] to tokens int64 [B]
        eos_token_id: ends a row; it is repeated behind the end until all rows have ended

        Returns int64 [B, n + generated].
        """
        logits, ids = self.prefill(input_ids, attention_mask), [input_ids.to(self.model.device)]
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=self.model.device)
        for left in range(max_new_tokens, 0, -1):
            token = select(logits)
            if eos_token_id is not None:
                token = token.masked_fill(ended, eos_token_id)
                ended = ended | (token == eos_token_id)
            ids.append(token[:, None])
            if left == 1 or (eos_token_id is not None and bool(ended.all())):
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
        self._ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._positions = torch.zeros_like(self._ids)
        self._prepared = True
        devices = {parameter.device for parameter in model.parameters()}
        if model.device.type != "cuda":
            self._fall_back(f"the model is on {model.device}, CUDA graphs need a CUDA device")
        elif len(devices) > 1:
            self._fall_back(f"the model lies on {len(devices)} devices, a CUDA graph on one")
        elif any(cache.is_sliding):
            self._fall_back("layers with a sliding window count their tokens in Python, which a graph would not do")
        else:
            cache.rehearse()
            self._capture()

    def _capture(self) -> None:
        forwards: list[Callable[..., Any]] = [self.model]
        if self.compiled:
            forwards.insert(0, torch.compile(self.model.forward, dynamic=False, mode="max-autotune-no-cudagraphs"))
        for forward in forwards:
            try:
                self._graph = self._captured(forward)
            except Exception as error:  # whatever a compiler or the capture raises; the next way is slower, not wrong
                lost = "torch.compile" if forward is not self.model else "a CUDA graph"
                self._fall_back(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", lost)
            else:
                self.mode = "graph"
                return

    def _captured(self, forward: Callable[..., Any]) -> torch.cuda.CUDAGraph:
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
        """One token a row, from `_ids` at `_positions`."""
        own = with_cache(self.model, self.cache)
        out = forward(input_ids=self._ids, position_ids=self._positions, **own, use_cache=True)
        self._positions.add_(1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _fall_back(self, why: str, lost: str = "a CUDA graph") -> None:
        self.why = why
        warnings.warn(f"decoding runs without {lost}, and slower: {why}", GraphWarning, stacklevel=4)
