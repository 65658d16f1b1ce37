"""The kernels compile to machine code for sm_80 and sm_90 on a machine without a GPU."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.attention import kernel as kernels  # noqa: E402
from kvpolicy_kernels.attention.merge.kernel import _merge_kernel, merge_config  # noqa: E402
from kvpolicy_kernels.attention.plan import unit_of  # noqa: E402

from tests.kernels.compiling import NAMES, SHARED_MEMORY, compiled  # noqa: E402

WIDE_LOAD = r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x10"  # of 16 bytes


def compile_attend(dtype, dim, group, n, arch, *variants):
    """variants: names of what the launch has besides, such as "CHUNK"; "INTERLEAVED": keys and values in one arena."""
    row = 2 * dim if "INTERLEAVED" in variants else dim
    plain = not {"SOFTCAP", "MASK", "LOGITS"} & set(variants)
    config = kernels.launch_config(dtype, dim, group * n, plain)
    warps = config.pop("num_warps")
    block = max(16, triton.next_power_of_2(dim))
    has = {f"HAS_{name}": name in variants for name in ("SOFTCAP", "SINK", "CHUNK", "MASK", "LOGITS", "LSE", "BLOCKS")}
    constants = {
        "D": dim, "DV": dim, "K_ROW": row, "V_ROW": row, "UNIT": unit_of(dim), "BLOCK_D": block, "BLOCK_DV": block,
        "EARLY": arch >= 90, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", **config, **has,
    }  # fmt: skip
    belongs = {
        "sink_ptr": "SINK", "lse_ptr": "LSE", "logits_ptr": "LOGITS", "chunk_k_ptr": "CHUNK", "chunk_v_ptr": "CHUNK",
        "chunk_mask_ptr": "MASK", "blocks_ptr": "BLOCKS", "offsets_ptr": "BLOCKS", "sizes_ptr": "BLOCKS",
    }  # fmt: skip
    constants |= {name: None for name, variant in belongs.items() if variant not in variants}
    if "BLOCKS" in variants:
        constants["starts_ptr"] = None
    types = {}
    for name in kernels._attend_kernel.arg_names:
        if name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "chunk_k_ptr", "chunk_v_ptr"):
            types[name] = f"*{NAMES[dtype]}"
        elif name.endswith("_ptr"):
            wide = ("starts_ptr", "lengths_ptr", "offsets_ptr", "sizes_ptr")
            types[name] = "*i64" if name in wide else "*u8" if name == "chunk_mask_ptr" else "*i32"
            if name in ("lse_ptr", "part_ptr", "part_lse_ptr", "logits_ptr", "sink_ptr"):
                types[name] = "*fp32"
        else:
            types[name] = "fp32" if name in ("scale_log2", "softcap_log2", "tanh_scale") else "i32"
    small = ("quantum_ptr", "chunk_mask_ptr", "stride_mb", "stride_mn", "blocks_ptr", "stride_blocks")
    aligned = [x for x in types if x.startswith("stride_") or x.endswith("_ptr")]
    aligned = [x for x in aligned if x not in small and x not in constants]
    return compiled(kernels._attend_kernel, arch, constants, types, aligned, warps, 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "dim", "group", "n"),
    [
        (torch.bfloat16, 64, 3, 1),
        (torch.bfloat16, 80, 1, 1),
        (torch.bfloat16, 96, 4, 1),
        (torch.bfloat16, 128, 4, 1),
        (torch.float16, 256, 2, 1),
        (torch.bfloat16, 64, 8, 16),
        (torch.bfloat16, 128, 7, 4),
        (torch.float32, 64, 3, 1),
        (torch.float32, 128, 4, 1),
    ],
    ids=str,
)
def test_attention_compiles(dtype, dim, group, n, arch):
    kernel = compile_attend(dtype, dim, group, n, arch)
    ptx = kernel.ptx
    assert len(kernel.cubin) > 0
    assert "mma" in ptx, "the products must run on tensor cores"
    assert kernel.shared <= SHARED_MEMORY[arch] // 2  # two programs side by side
    assert re.search(WIDE_LOAD, ptx)
    assert ("griddepcontrol.launch_dependents" in ptx) == (arch >= 90)
    if dtype != torch.float32 or dim <= 64:  # see launch_config
        assert kernel.spilled == 0


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize(
    "variants", [("SOFTCAP", "SINK"), ("CHUNK", "LSE"), ("CHUNK", "MASK"), ("LOGITS", "LSE")], ids=str
)
def test_variants_compile(variants, n):
    kernel = compile_attend(torch.bfloat16, 128, 4, n, 90, *variants)
    assert kernel.shared <= SHARED_MEMORY[90] // 2
    assert kernel.spilled == 0


@pytest.mark.parametrize("dim", [80, 128])
def test_keys_and_values_of_one_arena_compile(dim):
    """Rows that are further apart are loaded as widely, and cost no register more than there is."""
    kernel = compile_attend(torch.bfloat16, dim, 4, 1, 90, "INTERLEAVED")
    assert re.search(WIDE_LOAD, kernel.ptx)
    assert kernel.spilled == 0


@pytest.mark.parametrize(("dim", "group"), [(64, 3), (128, 4)], ids=str)
def test_entries_in_blocks_compile(dim, group):
    """Rows that a table says are loaded as widely, and ahead of the products."""
    kernel = compile_attend(torch.bfloat16, dim, group, 1, 90, "INTERLEAVED", "BLOCKS")
    assert re.search(WIDE_LOAD, kernel.ptx)
    assert kernel.shared <= SHARED_MEMORY[90] // 2
    assert kernel.spilled == 0


@pytest.mark.parametrize("sizes", [(8, 264, 4, 128), (512, 264, 4, 128)], ids=str)
def test_merge_compiles(sizes):
    config = merge_config(*sizes)
    warps = config.pop("num_warps")
    constants = {"DV": 128, "HAS_LSE": True, "EARLY": True, **config}
    types = {"out_ptr": "*bf16", "pieces_ptr": "*i32", "num_rows": "i32"}
    types |= dict.fromkeys(("lse_ptr", "part_ptr", "part_lse_ptr"), "*fp32")
    aligned = [name for name in types if name.endswith("_ptr")]
    kernel = compiled(_merge_kernel, 90, constants, types, aligned, warps, 3)
    assert "griddepcontrol.wait" in kernel.ptx
    assert kernel.spilled == 0
