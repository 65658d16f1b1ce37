"""The decoded tokens of a cache as replays of one CUDA graph.

What a token changes in the tables is worked out on the host (`RaggedStore.advance`), and what the model does on the
device is the same for every token, as long as the entries stay where they are. So the model's forward is recorded once,
the second time that a token comes, and replayed from then on. Where entries get another place (a later turn, segments
that have grown beyond their room) it is recorded again, which takes about as long as two tokens without a graph.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kvpolicy.cache.device_tables import on_device
from kvpolicy.errors import GraphWarning
from kvpolicy.integrations.transformers.attention.columns import Reading, read_mask
from kvpolicy.integrations.transformers.cache.cuda_graph import Recording, record, unrecordable
from kvpolicy.integrations.transformers.cache.window_ring import StepCounts

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache

Forward = Callable[..., Any]

_INPUTS = frozenset({"input_ids", "position_ids", "cache_position"})
"""Tensors that a forward of a token may be given besides its mask."""

_CACHE = object()  # stands for the cache in what a recorded forward returned

_SHORT, _TOO_OFTEN = 8, 3  # tokens of a recording that did not pay, and how many such in a row are given a try


@dataclass(slots=True, eq=False)
class _Step:
    """A recorded forward.

    key: what has to be the same for a replay
    out: what it returned, whose tensors each replay fills anew
    """

    key: list[Any]
    recording: Recording
    out: Any
    replayed: int = 0

    def replay(self) -> None:
        self.recording.replay()
        self.replayed += 1


@dataclass(frozen=True, slots=True, eq=False)
class _Token:
    """A forward of one token.

    inputs:   tensors that differ from token to token, at addresses that stay
    constant: its other arguments, by name
    counts:   what it goes by as a step
    reading:  what its mask says
    kind:     what has to be the same for its kernels to be loaded
    key:      what has to be the same for a replay: entries at the same addresses, too
    """

    forward: Forward
    inputs: dict[str, Tensor]
    constant: dict[str, Any]
    counts: StepCounts
    reading: Reading
    kind: list[Any]
    key: list[Any]

    def run(self) -> Any:
        return self.forward(**self.inputs, **self.constant)


class Replays:
    """How the tokens of one cache are decoded.

    mode: "graph", or "eager" where the last token ran without a graph; None before the first one
    why:  the reason for "eager"
    """

    def __init__(self) -> None:
        self.mode: Literal["graph", "eager"] | None = None
        self.why: str | None = None
        self.compiled = False
        self._step: _Step | None = None
        self._ran: list[Any] = []  # calls that have run, so that their kernels are loaded
        self._inputs: dict[str, Tensor] = {}
        self._counts: StepCounts | None = None
        self._failed = False  # whether compiled code could not be recorded once
        self._forward: Forward | None = None
        self._short_lived = 0
        self._hopeless: str | None = None  # why it is not tried again
        self._told: set[str] = set()
        self._hooks = _Hooks()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a graph belongs to one cache

    def forget(self) -> None:
        """Another text begins."""
        self.mode, self.why, self._step = None, None, None
        self._short_lived, self._hopeless = 0, None

    def compile(self, forward: Forward) -> None:
        """Has `torch.compile` fuse the model's small operations before a step is recorded. forward: the model's own."""
        self.compiled, self._failed, self._step, self._ran = True, False, None, []
        self._forward = torch.compile(forward, dynamic=False, mode="max-autotune-no-cudagraphs")

    def run(self, cache: RaggedCache, model: PreTrainedModel, own: Forward, call: dict[str, Any]) -> Any:
        """The output of a model's forward of one token behind what the cache holds; None where its own has to run.

        own: the model's forward;  call: its arguments by name
        """
        if not is_token(cache, call):
            return None
        reading, why = self._reading(cache, model, call)
        if why:
            self._fall_back(why, cache)
        if reading is None:
            return None
        if not cache.opened().advance(cache.rollback):
            self._fall_back("tokens that can be taken back, or could, are still to be kept or given up", cache)
            return None
        cache.open_rings()
        if why is None:
            token = self._token(cache, model, own, call, reading)
            for way in (self._replay, self._load, self._record):
                if (out := way(cache, token)) is not None:
                    return out
        inputs = {name: value for name, value in call.items() if name != "attention_mask"} | _inputs(cache, call)
        return cache.run_step(functools.partial(own, **inputs), self._counted(cache), reading)

    def _reading(
        self, cache: RaggedCache, model: PreTrainedModel, call: dict[str, Any]
    ) -> tuple[Reading | None, str | None]:
        """What the token's mask says, None where the token cannot be a step; and why no graph can hold it, if so."""
        no_graph = unrecordable(call["input_ids"].device)
        why = obstacle(cache, model, call) or self._hopeless
        if not no_graph:  # a step without one calls the hooks
            why = why or self._hooks.obstacle(model)
        # where no graph can be, a step is still the quickest way; transformers' own layers take its windows on
        if not cache.is_stepped and (why or (no_graph and cache.rings)):
            return None, no_graph or why
        layer = cache.budgeted[0]
        reading = read_mask(call.get("attention_mask"), 1, layer.columns, cache.opened().seen, layer.filled)
        if reading.valid is not None:
            return None, "attention_mask calls the token padding in some rows, and those go on without one"
        if reading.visible is not None:
            return None, "attention_mask hides tokens that the cache holds"
        return reading, no_graph or why

    def _token(
        self, cache: RaggedCache, model: PreTrainedModel, own: Forward, call: dict[str, Any], reading: Reading
    ) -> _Token:
        inputs, counts = self._placed(_inputs(cache, call)), self._counted(cache)
        constant = {name: value for name, value in call.items() if name not in inputs and name != "attention_mask"}
        weights = next(model.parameters()).data_ptr()  # others where the model has been moved
        # without the cache, which holds what is kept here: it is to be free as soon as it is dropped
        settings = {name: None if value is cache else value for name, value in constant.items()}
        kind = [self.compiled, id(model), weights, settings, {name: (x.shape, x.dtype) for name, x in inputs.items()}]
        return _Token(self._forward or own, inputs, constant, counts, reading, kind, [*kind, *cache.layouts])

    def _replay(self, cache: RaggedCache, token: _Token) -> Any:
        """By the graph that there is; None where it is of another step."""
        if self._step is None or self._step.key != token.key:
            return None
        cache.pass_step(self._step.replay, token.reading)
        self.mode, self.why = "graph", None
        return _copied(self._step.out, cache)

    def _load(self, cache: RaggedCache, token: _Token) -> Any:
        """As a step without a graph, which loads its kernels; None where one of its kind has run before."""
        if self._ran.count(token.kind) >= (2 if self.compiled else 1):  # compiled code may be made again
            return None
        out = cache.run_step(token.run, token.counts, token.reading)
        self._ran = [token.kind, *self._ran[:1]]
        self.mode, self.why = "eager", "it was the first of its kind, which loads the kernels: the next is recorded"
        return out

    def _record(self, cache: RaggedCache, token: _Token) -> Any:
        """By a new graph; None where it cannot be recorded."""
        before, self._step = self._step, None  # its memory is free before the next one takes its own
        if before is not None:
            self._short_lived = self._short_lived + 1 if before.replayed < _SHORT else 0
        if self._short_lived == _TOO_OFTEN:
            self._hopeless = "its entries move every few tokens, so that recording them would not pay"
        del before
        restore = cache.bookmark()
        try:
            step = functools.partial(cache.trace_step, token.run, token.counts)
            recording, out = record(step, token.counts.columns.device)
        except BaseException as error:
            restore()
            if not isinstance(error, Exception):
                raise
            if (why := self._note_failure(error)) is not None:
                self._fall_back(why, cache)
            return None
        recording.replay()
        cache.count_step(token.reading)
        self._step = _Step(token.key, recording, _kept(out, cache))
        self.mode, self.why = "graph", None
        return _copied(self._step.out, cache)

    def _note_failure(self, error: Exception) -> str | None:
        """Why tokens run without a graph now; None where the next one is tried in the same way."""
        text = str(error).splitlines()
        why = f"{type(error).__name__}: {text[0] if text else ''}"
        if not self.compiled:
            self._hopeless = why
            return why
        if self._failed:  # without the compiler it may go
            self.compiled, self._forward, self._ran = False, None, []
            return f"the compiled model cannot be recorded: {why}"
        self._failed, self._ran = True, []  # a compiler that had more to do; by the next try it has done it
        return None

    def _counted(self, cache: RaggedCache) -> StepCounts:
        """What the step goes by, where a recorded one looks for it."""
        seen, device = cache.opened().seen, cache.opened().layers[0].arena.device  # type: ignore[union-attr]
        counts = self._counts
        if counts is None or counts.seen.shape != seen.shape or counts.seen.device != device:
            with torch.inference_mode(False):  # else they could not be written to outside of that mode
                columns = torch.empty((), dtype=torch.int64, device=device)
                counts = self._counts = StepCounts(columns, torch.empty_like(seen, device=device))
        counts.columns.fill_(cache.budgeted[0].columns)
        if cache.rings:
            counts.seen.copy_(on_device(seen, device))
        return counts

    def _placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies at addresses that stay: where every step looks for them, recorded or not."""
        for name, value in inputs.items():
            own = self._inputs.get(name)
            if own is None or (own.shape, own.dtype, own.device) != (value.shape, value.dtype, value.device):
                with torch.inference_mode(False):  # else they could not be written to outside of that mode
                    self._inputs[name] = own = torch.empty_like(value, memory_format=torch.contiguous_format)
            own.copy_(value)
        return {name: self._inputs[name] for name in inputs}

    def _fall_back(self, why: str, cache: RaggedCache) -> None:
        self.mode, self.why = "eager", why
        if cache.opened().layers[0].arena.device.type == "cuda" and why not in self._told:  # type: ignore[union-attr]
            self._told.add(why)
            warnings.warn(f"decoding runs without a CUDA graph, and slower: {why}", GraphWarning, stacklevel=6)


def is_token(cache: RaggedCache, call: dict[str, Any]) -> bool:
    """Whether a forward is one of a single token for each row, behind a prompt."""
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or call.get("inputs_embeds") is not None:
        return False
    return cache.is_decoding and cache.attached() and len(ids) == cache.opened().batch_size


def obstacle(cache: RaggedCache, model: PreTrainedModel, call: dict[str, Any]) -> str | None:
    """Why a forward of a token cannot be recorded on a device that records, or None."""
    device = call["input_ids"].device
    if len({layer.arena.device for layer in cache.opened().layers if layer is not None} | {device}) > 1:
        return "the layers lie on several devices, a CUDA graph on one"
    if cache.opened().num_heads != cache.spec.num_kv_heads:
        return "processes share the model, and what they exchange is not recorded"
    if cache.recording and not cache.is_holding:
        return "the last tokens may be taken back (assisted generation), and drafts come several at a time"
    if cache.other_kinds:
        kinds = ", ".join(cache.other_kinds)
        return f"layers of other kinds ({kinds}) count their tokens in Python, which a graph would not do"
    if cache.budgeted[0].columns == cache.dropped_at:  # which is refused
        return f"the model drops its cache beyond {cache.dropped_at} tokens"
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        return "gradients are recorded: call the model under torch.no_grad()"
    if model.training:
        return "the model is in training mode: call model.eval()"
    if torch.is_autocast_enabled(device.type):
        return "torch.autocast casts the weights at each token: load the model in the dtype that it is to run in"
    for name, value in call.items():
        if isinstance(value, Tensor) and name not in _INPUTS and name != "attention_mask":
            return f"the model is given {name}, which a graph would not look at again"
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "the attention mask is not one of columns, [B, n]"
    if call.get("position_ids") is None and (cache.state.is_carried or not _takes_positions(type(model).forward)):
        return "the model works out positions of its own for each token"
    return None


@functools.cache
def _takes_positions(forward: Forward) -> bool:
    return "position_ids" in inspect.signature(forward).parameters


def _inputs(cache: RaggedCache, call: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that differ from token to token; with positions, which a model would otherwise count in Python."""
    inputs = {name: call[name] for name in _INPUTS if isinstance(call.get(name), Tensor)}
    if "position_ids" not in inputs:
        ids = inputs["input_ids"]
        inputs["position_ids"] = torch.full_like(ids, cache.budgeted[0].columns)
    return inputs


class _Hooks:
    """The hooks on a model's modules, looked through again only when there are more or fewer of them."""

    def __init__(self) -> None:
        self._tables: list[Mapping[int, Any]] = []
        self._count = -1
        self._why: str | None = None
        self._model: weakref.ref[PreTrainedModel] | None = None

    def obstacle(self, model: PreTrainedModel) -> str | None:
        """Why a graph would leave something out, or None."""
        if self._model is None or self._model() is not model:
            self._tables = [x for module in model.modules() for x in (module._forward_pre_hooks, module._forward_hooks)]
            self._model, self._count = weakref.ref(model), -1
        count = sum(map(len, self._tables))
        if count != self._count:
            hooks = [hook for table in self._tables for hook in table.values()]
            self._count, self._why = count, None
            if any(not getattr(hook, "__module__", type(hook).__module__).startswith("kvpolicy.") for hook in hooks):
                self._why = "a hook is registered on one of the model's modules, which a graph would not call"
        return self._why


def _copied(out: Any, cache: object) -> Any:
    """An output whose tensors the next replay does not overwrite, with the cache in its place."""
    return _each(out, lambda value: value.clone() if isinstance(value, Tensor) else cache if value is _CACHE else value)


def _kept(out: Any, cache: object) -> Any:
    """An output that holds its tensors, but not the cache."""
    return _each(out, lambda value: _CACHE if value is cache else value)


def _each(out: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(out, ModelOutput):
        return type(out)(**{name: _each(value, change) for name, value in out.items()})
    if type(out) in (list, tuple):
        return type(out)(_each(value, change) for value in out)
    return change(out)
