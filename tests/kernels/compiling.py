"""Compiling a kernel to machine code on a machine without a GPU."""

import os
import re
import subprocess

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compiled(kernel, arch, constants, types, aligned, num_warps, num_stages):
    """Compiles for sm_80 or sm_90.

    constants: values of the constexpr arguments (None where a pointer is absent);  types: of the others, such as
    "*bf16" and "i32";  aligned: names of pointers and strides that are multiples of 16, as they are at a launch
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs the interpreter")
    places = {name: index for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs={(places[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spilled_bytes(ptx, arch, folder):
    """What ptxas reports for the kernel."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    ptxas = triton.knobs.nvidia.ptxas.path
    name = f"sm_{arch}a" if f".target sm_{arch}a" in ptx else f"sm_{arch}"
    command = [ptxas, "-v", f"--gpu-name={name}", str(path), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
