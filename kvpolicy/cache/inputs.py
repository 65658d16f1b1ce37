"""What a caller hands to a store: checked on the host, before anything is changed. All of it raises `BudgetError`."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor

from kvpolicy.cache.scoring import Scoring
from kvpolicy.errors import BudgetError
from kvpolicy.model.layer_spec import LayerSpec


def layer_index(layer: object, count: int) -> int:
    """A budgeted layer of a store that has `count` of them. Negative numbers do not count from the end."""
    if type(layer) is int and 0 <= layer < count:  # several times a step, so no more than this
        return layer
    index = _whole(layer)
    if index is None or not 0 <= index < count:
        raise BudgetError(f"layer is {layer!r}, expected a whole number from 0 to {count - 1}: the budgeted layers")
    return index


def token_count(count: object) -> int:
    """How many tokens `crop` takes back."""
    number = _whole(count)
    if number is None or number < 0:
        raise BudgetError(f"crop takes the number of tokens to take back, got {count!r}")
    return number


def local_heads(heads: tuple[int, int] | None, total: int) -> tuple[int, int]:
    """(first, count) of the KV heads that a store holds; None means all."""
    first, count = (0, total) if heads is None else heads
    if not 0 <= first < first + count <= total:
        raise BudgetError(f"heads must be (first, count) of the model's {total} KV heads, got {heads}")
    return first, count


def place(dtype: torch.dtype, device: str | torch.device) -> torch.device:
    """The device that entries of this dtype will lie on, with its index."""
    if not dtype.is_floating_point:
        raise BudgetError(f"dtype is {dtype}, expected a floating-point dtype")
    try:
        target = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BudgetError(f"device is {device!r}, which is not here: {reason}") from None
    if target.type == "meta":
        raise BudgetError("device is 'meta', which holds no entries")
    return target


def check_turn(layer: int, own: Tensor, after: Tensor, other: int, theirs: Tensor) -> None:
    """Whether it is a layer's turn: a forward hands the same tokens to each layer once, in order. So the first layer
    begins where all have seen as many, and the others follow the one before them.

    own, after: int64 [B], tokens that the layer has seen, and will have seen
    other, theirs: the layer before it, of the first layer the last one, and what that has seen
    """
    mine = after if layer else own
    if mine is not theirs and not torch.equal(mine, theirs):
        raise BudgetError(
            f"layer {layer} has seen {own.tolist()} tokens of each sequence and is handed {(after - own).tolist()} "
            f"more, but layer {other} has seen {theirs.tolist()}: each forward hands its tokens to every layer once, "
            "in order"
        )


def check_behind_prompt(layer: int, seen: Tensor) -> None:
    """Whether every row has a token. A row without one may still be in its padding, of which `decode` is not told."""
    if 0 in seen.tolist():
        raise BudgetError(
            f"decode takes a token behind a prompt, but the rows of layer {layer} have seen {seen.tolist()} tokens: "
            "the first tokens of each row, be it one, come through prefill, which takes num_padding= besides"
        )


def check_single(layer: int, key: Tensor, possible: bool) -> None:
    """Whether these keys are one token. possible: whether the layer can take one by itself."""
    if key.shape[2] != 1 or not possible:
        raise BudgetError(
            f"append takes one token where tokens are held and none is pending, got {key.shape[2]} for layer {layer}; "
            "prefill, or arrive and keep, take the others"
        )


def check_entries(key: Tensor, value: Tensor, batch: int, num_heads: int, shape: LayerSpec) -> None:
    """key: [B, H, n, key_dim];  value: [B, H, n, value_dim]; of one floating dtype, on one device."""
    _check_tensors(keys=key, values=value)
    count = key.shape[2] if key.dim() == 4 else "n"
    sizes = (batch, num_heads, count, shape.key_dim), (batch, num_heads, count, shape.value_dim)
    if (key.shape, value.shape) != sizes:
        raise BudgetError(
            f"this store holds {batch} sequences of {num_heads} KV heads: expected keys and values of shape {sizes[0]} "
            f"and {sizes[1]}, got {tuple(key.shape)} and {tuple(value.shape)}"
        )


def check_agreement(layer: int, keys: Tensor, key: Tensor, value: Tensor) -> None:
    """Whether keys and values are of the dtype and on the device of what the layer holds."""
    for came in (key, value):
        if (came.dtype, came.device) != (keys.dtype, keys.device):
            raise BudgetError(
                f"layer {layer} of this store holds {keys.dtype} on {keys.device}, got {came.dtype} on {came.device}"
            )


def check_query(query: Tensor, like: Tensor, batch: int, num_q_heads: int, count: int | None = None) -> None:
    """query: [B, num_q_heads, n, D].

    like:  the keys that it looks at, [..., D], of the same dtype and device
    count: n, None for any number
    """
    _check_tensors(queries=query)
    shape, expected = tuple(query.shape), (batch, num_q_heads, "n" if count is None else count, like.shape[-1])
    if len(shape) != 4 or any(a != b for a, b in zip(shape, expected, strict=True) if b != "n"):
        raise BudgetError(f"expected queries of shape {expected}, got {shape}")
    if (query.dtype, query.device) != (like.dtype, like.device):
        raise BudgetError(
            f"queries are {query.dtype} on {query.device}, the keys are {like.dtype} on {like.device}: they must agree"
        )


def key_centres(
    centres: Sequence[KeyCentre | None] | None, num_layers: int, num_heads: int, key_dim: int
) -> list[KeyCentre | None]:
    """Of each layer what its keys lie around, or None. Raises `BudgetError` for other shapes."""
    found: list[KeyCentre | None] = [None] * num_layers if centres is None else list(centres)
    shapes = [None if centre is None else centre.shape for centre in found]
    if len(found) != num_layers or not {*shapes} <= {None, (num_heads, key_dim)}:
        raise BudgetError(
            f"key_centres must be one of shape {(num_heads, key_dim)} or None for each of {num_layers} layers, got "
            f"{shapes}"
        )
    return found


def scoring_of(
    shape: LayerSpec, model_type: str, num_q_heads: int, scale: float | None, sink_logits: Tensor | None
) -> Scoring:
    """What a call says of its attention, and the layer's shape where it says nothing. sink_logits: [num_q_heads]."""
    if shape.sinks and sink_logits is None:
        raise BudgetError(f"model type '{model_type}' has learned sinks: give sink_logits [num_q_heads]")
    if sink_logits is not None and (not isinstance(sink_logits, Tensor) or sink_logits.shape != (num_q_heads,)):
        came = tuple(sink_logits.shape) if isinstance(sink_logits, Tensor) else type(sink_logits).__name__
        raise BudgetError(f"sink_logits must be a tensor [{num_q_heads}], one for each query head, got {came}")
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise BudgetError(f"scale is {scale!r}, expected a finite number")
    return Scoring(shape.scale if scale is None else scale, shape.softcap, sink_logits)


def validity(valid: Tensor | None, batch: int, count: int) -> Tensor | None:
    """valid: bool [B, count], False for padding. Returns it on the CPU."""
    if not count or (valid is not None and (valid.shape != (batch, count) or valid.dtype != torch.bool)):
        came = None if valid is None else f"{valid.dtype} {list(valid.shape)}"
        raise BudgetError(
            f"expected at least one token and valid=bool {[batch, count]} or None, got {count} and {came}"
        )
    return None if valid is None else valid.cpu()


def padding_mask(num_padding: Tensor | Sequence[int] | None, seen: Tensor, count: int) -> Tensor | None:
    """Which tokens are no padding: bool [B, count] on the CPU, None for all.

    num_padding: [B], tokens at the start of each row that are padding
    seen:        int64 [B], tokens of each row before these; padding stands in front of all of them
    """
    if num_padding is None:
        return None
    try:
        padding = torch.as_tensor(num_padding).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BudgetError(f"num_padding is {num_padding!r}, expected a whole number for each row: {error}") from None
    if padding.shape != seen.shape:
        raise BudgetError(f"num_padding must be [{len(seen)}], one for each row, got {list(padding.shape)}")
    if _is_fractional(padding) or bool(((padding < 0) | (padding > count)).any()):
        raise BudgetError(f"num_padding is {padding.tolist()}, expected whole numbers from 0 to the {count} tokens")
    late = (padding > 0) & (seen > 0)
    if bool(late.any()):
        row = int(late.nonzero()[0])
        raise BudgetError(
            f"num_padding is {int(padding[row])} for row {row}, which has seen {int(seen[row])} tokens already: "
            "padding stands at the start of a row, in front of its first token"
        )
    return torch.arange(count)[None] >= padding[:, None]


def row_indices(rows: Tensor | Sequence[int], batch: int) -> Tensor:
    """int64 [B'] on the CPU, rows of a batch."""
    indices = torch.as_tensor(rows).cpu()
    is_whole = indices.dim() == 1 and len(indices) > 0 and not _is_fractional(indices)
    if not is_whole or int(indices.min()) < 0 or int(indices.max()) >= batch:
        raise BudgetError(f"take expects rows from 0 to {batch - 1}, got {indices.tolist()}")
    return indices.long()


@dataclass(slots=True)
class Finiteness:
    """Whether keys, values and queries are numbers.

    Those on the CPU are looked at at once. A device is not waited for: what is found there is gathered, and asked for
    with `check`. largest: [] of each state since the last check, the largest of its numbers, whatever their sign
    """

    largest: list[Tensor] = field(default_factory=list)

    def add(self, layer: int, **states: Tensor) -> None:
        """states: by name; of padding too, as it takes part in sums, with a factor of 0.

        Raises for those on the CPU that are NaN or infinite.
        """
        for name, state in states.items():
            if state.device.type == "cpu":
                if not math.isfinite(state.sum().item()) and not bool(state.isfinite().all()):  # a sum is quicker
                    raise BudgetError(f"layer {layer}: {name} hold NaN or infinite numbers")
            else:
                # in one launch, and neither NaN nor infinity is hidden
                self.largest.append(torch.linalg.vector_norm(state.detach(), math.inf))

    def check(self) -> None:
        """Waits for the device. Raises where anything since the last check was no number."""
        largest, self.largest = self.largest, []
        if largest and not bool(torch.stack([each.to(largest[0].device) for each in largest]).isfinite().all()):
            raise BudgetError("keys or values of these tokens hold NaN or infinite numbers: this store is spoiled")

    def fork(self) -> Finiteness:
        return Finiteness([*self.largest])


def _check_tensors(**states: object) -> None:
    for name, state in states.items():
        if not isinstance(state, Tensor):
            raise BudgetError(f"{name} must be a tensor, got {type(state).__name__}")
        if not state.dtype.is_floating_point:
            raise BudgetError(f"{name} are {state.dtype}, expected a floating-point dtype")


def _whole(value: object) -> int | None:
    """`value` as an int, None where it is none; True and False are none."""
    if isinstance(value, bool):
        return None
    with contextlib.suppress(TypeError):
        return operator.index(value)  # type: ignore[arg-type]
    return None


def _is_fractional(numbers: Tensor) -> bool:
    return numbers.dtype == torch.bool or numbers.is_complex() or numbers.is_floating_point()
