"""The kernel compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.attention.chunk.kernel import _attend_chunk_kernel, launch_config  # noqa: E402

from tests.kernels.compiling import NAMES, SHARED_MEMORY, compiled  # noqa: E402

CONSUMER = 99 * 1024  # bytes of shared memory that a program may have on sm_86 and sm_89, whose code is that of sm_80
WIDE_LOAD = r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x10"  # of 16 bytes


def compile_attend(dtype, dim, group, rows, arch, *variants, value_dim=None):
    """variants: names of what the launch has besides, such as "MASK"; "INTERLEAVED": keys and values in one arena."""
    value_dim = value_dim or dim
    interleaved = "INTERLEAVED" in variants
    config = launch_config(dtype, max(dim, value_dim), rows, bool({"MASK", "ENTRY_MASK"} & set(variants)), arch >= 90)
    warps = config.pop("num_warps")
    constants = {
        "GROUP": group, "D": dim, "DV": value_dim, "SPLIT": "SPLIT" in variants,
        "K_ROW": dim + value_dim if interleaved else dim, "V_ROW": dim + value_dim if interleaved else value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", **config,
        **{f"HAS_{name}": name in variants for name in ("SOFTCAP", "SINK", "CHUNK", "MASK", "ENTRY_MASK", "FOUND")},
    }  # fmt: skip
    belongs = {
        "sink_ptr": "SINK", "chunk_k_ptr": "CHUNK", "chunk_v_ptr": "CHUNK", "chunk_mask_ptr": "MASK",
        "entry_mask_ptr": "ENTRY_MASK", "mask_starts_ptr": "ENTRY_MASK", "part_ptr": "SPLIT", "part_lse_ptr": "SPLIT",
        "found_ptr": "FOUND", "found_lse_ptr": "FOUND",
    }  # fmt: skip
    constants |= {name: None for name, variant in belongs.items() if variant not in variants}
    types = {}
    for name in _attend_chunk_kernel.arg_names:
        if name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "chunk_k_ptr", "chunk_v_ptr"):
            types[name] = f"*{NAMES[dtype]}"
        elif name in ("sink_ptr", "part_ptr", "part_lse_ptr", "found_ptr", "found_lse_ptr"):
            types[name] = "*fp32"
        elif name in ("chunk_mask_ptr", "entry_mask_ptr"):
            types[name] = "*u8"
        elif name.endswith("_ptr"):
            types[name] = "*i64"
        else:
            types[name] = "fp32" if name in ("scale_log2", "softcap_log2", "tanh_scale") else "i32"
    small = ("chunk_mask_ptr", "entry_mask_ptr", "stride_mb", "stride_mn")
    aligned = [x for x in types if x.startswith("stride_") or x.endswith("_ptr")]
    aligned = [x for x in aligned if x not in small and x not in constants]
    return compiled(_attend_chunk_kernel, arch, constants, types, aligned, warps, 3)


def check(made, arch, dtype):
    assert len(made.cubin) > 0
    assert "mma" in made.ptx, "the products must run on tensor cores"
    assert made.shared <= (SHARED_MEMORY[90] if arch >= 90 else CONSUMER)
    if dtype != torch.float32:  # three tf32 passes need more registers than there are; see launch_config
        assert made.spilled == 0
        assert re.search(WIDE_LOAD, made.ptx)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "dim", "group", "rows"),
    [
        (torch.bfloat16, 64, 3, 4096),
        (torch.bfloat16, 80, 1, 4096),
        (torch.bfloat16, 128, 4, 4096),
        (torch.float16, 128, 8, 64),
        (torch.float16, 256, 2, 4096),
        (torch.float32, 64, 3, 4096),
        (torch.float32, 128, 4, 4096),
    ],
    ids=str,
)
def test_chunk_attention_compiles(dtype, dim, group, rows, arch):
    made = compile_attend(dtype, dim, group, rows, arch, "CHUNK")
    check(made, arch, dtype)
    if arch >= 90 and dtype != torch.float32:
        assert "wgmma" in made.ptx


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    "variants",
    [
        ("CHUNK", "MASK", "ENTRY_MASK", "SINK"),
        ("CHUNK", "SOFTCAP", "SINK", "SPLIT"),
        ("CHUNK", "FOUND"),
        ("CHUNK", "MASK", "SOFTCAP", "FOUND"),
    ],
)
def test_variants_compile(variants, dim, arch):
    check(compile_attend(torch.bfloat16, dim, 4, 4096, arch, *variants), arch, torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (64, 128)])
def test_other_value_dims_and_one_arena_compile(dim, value_dim, arch):
    made = compile_attend(torch.bfloat16, dim, 4, 4096, arch, "CHUNK", "INTERLEAVED", value_dim=value_dim)
    check(made, arch, torch.bfloat16)
