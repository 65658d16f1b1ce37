"""The kernel compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.append import kernel

from tests.kernels.compiling import compiled

KINDS = ("*bf16", "*bf16", "*i32", "*fp32")


@pytest.mark.parametrize("arch", [80, 90])
def test_append_compiles(arch):
    """Keys, values, positions and scores; entries of the same dtypes, but for positions as the cache counts them."""
    function, dims = kernel._append_kernel, (128, 80, 1, 1)
    types = dict.fromkeys(function.arg_names, "*i64") | {
        "arena_ptrs": KINDS,
        "entry_ptrs": (*KINDS[:2], "*i64", "*fp32"),
        "arena_strides": (("i32", "i32"),) * 4,
        "entry_strides": (("i32", "i32"),) * 4,
    }
    config = kernel.launch_config([torch.empty(1, dims[0], dtype=torch.bfloat16)])
    assert compiled(function, arch, {"DIMS": dims}, types, [], config["num_warps"], 3).spilled == 0
