"""The kernels compile to machine code for sm_80 and sm_90 on a machine without a GPU."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.append import kernel

from tests.kernels.compiling import compiled

KINDS = ("*bf16", "*bf16", "*i32", "*fp32")


def compile_append(function, dims, arch, slots=False):
    """Keys, values, positions and scores; entries of the same dtypes, but for positions as the cache counts them."""
    constants = {"DIMS": dims} | ({} if function is kernel._append_kernel else {"HAS_SLOTS": slots})
    types = dict.fromkeys(function.arg_names, "*i64") | {
        "num_pinned": "i32",
        "arena_ptrs": KINDS,
        "entry_ptrs": (*KINDS[:2], "*i64", "*fp32"),
        "arena_strides": (("i32", "i32"),) * 4,
        "entry_strides": (("i32", "i32"),) * 4,
    }
    config = kernel.launch_config([torch.empty(1, dims[0], dtype=torch.bfloat16)])
    return compiled(function, arch, constants, types, [], config["num_warps"], 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("function", [kernel._append_kernel, kernel._append_next_kernel], ids=lambda f: f.__name__)
def test_append_compiles(function, arch):
    assert compile_append(function, (128, 80, 1, 1), arch).spilled == 0


def test_tables_are_read_before_they_are_updated():
    """Eight warps: a late one must not see the length that the first one's thread has counted up."""
    code = compile_append(kernel._append_next_kernel, (2048, 512, 1, 1), 90, slots=True)
    assert code.spilled == 0
    order = re.findall(r"ld\.global|st\.global|bar\.sync|barrier\.sync", code.ptx)
    barrier = next(i for i, name in enumerate(order) if name.startswith("bar"))
    assert set(order[:barrier]) == {"ld.global"}
    assert "ld.global" not in order[barrier:]
