"""Compiling a kernel to machine code on a machine without a GPU."""

import contextlib
import io
import os
import re
from typing import NamedTuple

import pytest
import torch
import triton
from kvpolicy_kernels.backend import LAUNCH
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class MachineCode(NamedTuple):
    """ptx, cubin: what triton made;  shared: bytes a program takes;  spilled: bytes, as the assembler reports them."""

    ptx: str
    cubin: bytes
    shared: int
    spilled: int


def coefficients(variants):
    """Of the keys' centre: of waves ("CENTRED"), of a constant, or none."""
    return 17 if "CENTRED" in variants else int("CONSTANT" in variants)


def compiled(kernel, arch, constants, types, aligned, num_warps, num_stages):
    """Compiles for sm_80 or sm_90.

    constants: values of the constexpr arguments (None where a pointer is absent);  types: of the others, such as
    "*bf16" and "i32";  aligned: names of pointers and strides that are multiples of 16, as they are at a launch
    """
    places = {name: index for index, name in enumerate(kernel.arg_names)}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {(places[name],): [["tt.divisibility", 16]] for name in aligned}
    return machine_code(kernel, arch, signature, constants, attributes, num_warps, num_stages)


def machine_code(kernel, arch, signature, constants, attributes, num_warps, num_stages):
    """As `compiled`, for whoever has the arguments of `ASTSource` himself.

    The assembler's own report is read: which one triton runs, and how, changes from version to version.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs the interpreter")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, **LAUNCH}
    said, knobs = io.StringIO(), triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill", said.getvalue())
    assert len(spills) == 2, f"stores and loads of one kernel, got {said.getvalue()!r}"
    return MachineCode(made.asm["ptx"], made.asm["cubin"], made.metadata.shared, sum(map(int, spills)))
