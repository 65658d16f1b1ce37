"""The kernel compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.window_attention.kernel import _window_attention_kernel, launch_config  # noqa: E402

from tests.kernels.compiling import NAMES, SHARED_MEMORY, compiled  # noqa: E402

POINTERS = ("q_ptr", "k_ptr", "v_ptr", "o_ptr")


def compile_window_attention(dtype, dim, group, arch, softcap=False, sinks=False, before=False, grows=False):
    config = launch_config(dtype, dim, arch >= 90)
    block = max(16, triton.next_power_of_2(dim))
    constants = {
        "NUM_Q_HEADS": 2 * group,
        "GROUP": group,
        "D": dim,
        "DV": dim,
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_D": block,
        "BLOCK_DV": block,
        "HAS_SOFTCAP": softcap,
        "HAS_SINK": sinks,
        "HAS_BEFORE": before,
        "GROWS": grows,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
    types = {}
    for name in _window_attention_kernel.arg_names:
        if name in POINTERS:
            types[name] = f"*{NAMES[dtype]}"
        elif name.endswith("_ptr"):
            types[name] = "*i32" if name == "window_ptr" else "*fp32"
        else:
            types[name] = "fp32" if name in ("scale_log2", "softcap_log2", "tanh_scale") else "i32"
    aligned = [name for name in types if name.endswith("_ptr") or name.startswith("stride_")]
    return compiled(
        _window_attention_kernel, arch, constants, types, aligned, config["num_warps"], config["num_stages"]
    )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", list(NAMES), ids=str)
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (80, 1), (128, 4), (256, 2)])
def test_window_attention_compiles(dtype, dim, group, arch):
    kernel = compile_window_attention(dtype, dim, group, arch)
    assert len(kernel.cubin) > 0
    assert "mma" in kernel.ptx, "the products must run on tensor cores"
    assert kernel.shared <= SHARED_MEMORY[arch]
    if dtype != torch.float32:  # three tf32 passes need more registers than there are; see launch_config
        assert kernel.spilled == 0


@pytest.mark.parametrize("variant", ["softcap", "sinks", "before", "grows"])
def test_window_attention_variants_compile(variant):
    kernel = compile_window_attention(torch.bfloat16, 128, 4, 90, **{variant: True})
    assert kernel.shared <= SHARED_MEMORY[90]
    assert kernel.spilled == 0
