"""Who reads which entries: equal work for every program, whatever the lengths of the segments.

All segments lie behind one another on a line of units, some entries each, and one unit more per segment, because to
begin a segment costs about as much as reading that many entries. Program c takes the units from `c * quantum` to
`(c + 1) * quantum - 1`, so the longest segment takes as many programs as it needs and short ones share a program. This
is stream-K scheduling (Osama et al., arXiv:2301.03598), as LeanAttention (arXiv:2405.10480) uses it for dense caches.

What program c does of segment s is a piece. Along the line either c or s rises from piece to piece, so `c + s` numbers
the pieces without a table, and the pieces of one segment have neighbouring numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton

PROGRAMS_PER_SM = 2  # of 1, 2, 3, 4 and 6 the fastest on an H200: fewer leave gaps, more make more partial results


@dataclass(frozen=True, slots=True, eq=False)
class WorkPlan:
    """How the programs of `decode_attention` share the segments of one or more layers; all on the device.

    units:    int32 [..., S], units of each segment when the plan was made
    quantum:  int32 [...], units of each program
    programs: int32 [..., P, 2], the segment each program begins with, and the unit of that segment
    pieces:   int32 [..., S, 2], the first piece of each segment, and how many it has
    unit:     entries of a unit; pieces begin at multiples of it
    """

    units: Tensor
    quantum: Tensor
    programs: Tensor
    pieces: Tensor
    unit: int

    def layer(self, index: int) -> WorkPlan:
        """The plan of one layer of several, as views."""
        return WorkPlan(self.units[index], self.quantum[index], self.programs[index], self.pieces[index], self.unit)


def plan_work(
    lengths: Tensor, *, head_dim: int = 128, num_programs: int | None = None, backend: Backend = "auto"
) -> WorkPlan:
    """Plans `decode_attention` for segments of these lengths, in one launch for all layers and without a host sync.

    lengths: int [S] or [L, S] on the device, each at least 0 and together below 2**31 units
    head_dim: the larger of the key's and the value's; a plan for another one gives the same result, less balanced
    num_programs: default two for every multiprocessor of the device

    A plan stays correct whatever becomes of the lengths: entries behind the planned ones are read by the last program
    of their segment. Only the balance suffers, so a new plan pays when the lengths have changed by some percent.
    Raises `ValueError` for another shape.
    """
    if lengths.dim() not in (1, 2) or lengths.shape[-1] == 0:
        raise ValueError(f"plan_work: expected lengths [S] or [L, S] with S of at least 1, got {list(lengths.shape)}")
    count = default_programs(lengths.device) if num_programs is None else num_programs
    if count < 1:
        raise ValueError(f"plan_work: num_programs must be at least 1, got {num_programs}")
    unit = unit_of(head_dim)
    if not uses_triton("plan_work", backend, lengths):
        return reference_plan(lengths, count, unit)
    from kvpolicy_kernels.attention.kernel import triton_plan

    plan: WorkPlan = triton_plan(lengths, count, unit)
    return plan


def unit_of(head_dim: int) -> int:
    """Entries of a unit. Beginning a segment weighs less beside large entries, so their units are smaller.

    Measured on an H200 among 16, 32, 64 and 128; 32 for all would cost up to a tenth at head dim 128.
    """
    return 128 if head_dim <= 128 else 32


def default_programs(device: torch.device) -> int:
    """Programs that fill a device."""
    if device.type != "cuda":
        return PROGRAMS_PER_SM
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def reference_plan(lengths: Tensor, num_programs: int, unit: int) -> WorkPlan:
    """The definition, in plain torch. lengths: int [S] or [L, S]."""
    units = (lengths + unit - 1) // unit + 1
    end = units.cumsum(-1)
    begin = end - units
    quantum = (end[..., -1:] + num_programs - 1) // num_programs
    target = torch.arange(num_programs, device=lengths.device) * quantum  # [..., P]
    segment = torch.searchsorted(end, target, right=True)
    before = torch.cat([torch.zeros_like(quantum), end], -1).gather(-1, segment)
    first, last = begin // quantum, (end - 1) // quantum
    number = torch.arange(lengths.shape[-1], device=lengths.device)
    return WorkPlan(
        units.int(),
        quantum[..., 0].int(),
        torch.stack([segment, target - before], -1).int(),
        torch.stack([first + number, last - first + 1], -1).int(),
        unit,
    )
