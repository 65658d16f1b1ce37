"""What a probe hands on of a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerGradients:
    """One attention of a sequence of T tokens, and how the loss depends on what each of its heads says.

    layer:     index among the budgeted layers, from 0; layers that share entries have the index of those
    first:     the first query that does not see all entries under a budget
    gradients: [num_q_heads, T, value_dim], of the loss by each head's output before the output projection
    values:    [num_kv_heads, T, value_dim]
    weights:   `weights(begin, end)`: float32 [num_q_heads, end - begin, end], the attention of these queries with
               nothing evicted; a row sums to less than 1 where the layer has sinks
    coded:     `coded(begin, end, name)`: what there would be with entries in the format of this name, what stays exact
               as it is: the weights, and each entry's part of gradient . output, both float32
               [num_q_heads, end - begin, end]; None where nothing is known of formats
    ranks:     `ranks(begin, end)`: int64 [num_kv_heads or 1, end - begin, end], see `ScoreBias`: a KV head of capacity
               c keeps what ranks below c less the sink tokens
    """

    layer: int
    first: int
    gradients: Tensor
    values: Tensor
    weights: Callable[[int, int], Tensor]
    ranks: Callable[[int, int], Tensor]
    coded: Callable[[int, int, str], tuple[Tensor, Tensor]] | None = None
