"""The kernel of many queries over codes compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.encoded_attention.chunk.kernel import _attend_codes_kernel, launch_config  # noqa: E402
from kvpolicy_kernels.encoded_attention.kernel import plane_block  # noqa: E402
from kvpolicy_kernels.formats import FORMATS  # noqa: E402

from tests.kernels.compiling import SHARED_MEMORY, coefficients, compiled  # noqa: E402

WIDE_LOAD = r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x(10|8)"  # of 16 or 8 bytes
CONSUMER = 99 * 1024  # bytes of shared memory that a program may have on sm_86 and sm_89, whose code is that of sm_80


def compile_attend(name, dtype, dim, arch, *variants, rows=4096):
    """variants: names of what the launch has besides, such as "SOFTCAP"."""
    planes = FORMATS[name].codes_in_word
    config = launch_config(dtype, dim, rows, arch >= 90)
    warps = config.pop("num_warps")
    constants = {
        "GROUP": 4, "D": dim, "DV": dim, "KW_ROW": dim // planes, "VW_ROW": dim // planes, "KS_ROW": 1, "VS_ROW": 1,
        "PLANES": planes, "PACKED": dtype != torch.float32, "BLOCK_W": plane_block(dim, planes),
        "BLOCK_WV": plane_block(dim, planes), "COEFFICIENTS": coefficients(variants), "BLOCK_C": 16,
        "HAS_SOFTCAP": "SOFTCAP" in variants, "HAS_SINK": "SINK" in variants, "HIDES": "HIDES" in variants,
        "SPLIT": "SPLIT" in variants, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", **config,
    }  # fmt: skip
    belongs = {"sink_ptr": "SINK", "part_ptr": "SPLIT", "part_lse_ptr": "SPLIT", "since_ptr": "HIDES"}
    constants |= {pointer: None for pointer, variant in belongs.items() if variant not in variants}
    if not coefficients(variants):
        constants |= dict.fromkeys(("of_centre_ptr", "frequency_ptr"))
    if not {"HIDES", "CENTRED"} & set(variants):
        constants["positions_ptr"] = None
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in _attend_codes_kernel.arg_names}
    types |= {"q_ptr": "*fp32" if dtype == torch.float32 else "*fp16", "kw_ptr": "*i16", "vw_ptr": "*i16"}
    types |= dict.fromkeys(("ks_ptr", "vs_ptr", "positions_ptr", "since_ptr", "frequency_ptr"), "*i32")
    types |= dict.fromkeys(("starts_ptr", "lengths_ptr", "order_ptr"), "*i64")
    types |= dict.fromkeys(("softcap_log2", "tanh_scale"), "fp32")
    aligned = [x for x in types if x.endswith("_ptr") and x not in constants]
    return compiled(_attend_codes_kernel, arch, constants, types, aligned, warps, 3)


def check(name, dtype, dim, arch, *variants, **kwargs):
    made = compile_attend(name, dtype, dim, arch, *variants, **kwargs)
    assert "mma" in made.ptx, "the products must run on tensor cores"
    assert made.shared <= (SHARED_MEMORY[90] if arch >= 90 else CONSUMER)
    assert made.spilled == 0
    assert dtype == torch.float32 or dim == 80 or re.search(WIDE_LOAD, made.ptx)
    return made


FAST = [("int4", torch.bfloat16, 128, 80), ("int4", torch.bfloat16, 128, 90), ("int8", torch.bfloat16, 64, 90)]
REST = [
    (name, dtype, dim, arch)
    for name in FORMATS
    for dtype, dim in (
        (torch.bfloat16, 128),
        (torch.bfloat16, 64),
        (torch.bfloat16, 80),
        (torch.float16, 256),
        (torch.float32, 64),
    )
    for arch in (80, 90)
]


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "arch"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST if case not in FAST)],
    ids=str,
)
def test_attention_compiles(name, dtype, dim, arch):
    made = check(name, dtype, dim, arch, "HIDES", "CENTRED")
    if arch >= 90 and dtype != torch.float32:
        assert "wgmma" in made.ptx


@pytest.mark.slow
@pytest.mark.parametrize(
    "variants",
    [("SOFTCAP", "SINK", "SPLIT"), ("SOFTCAP", "HIDES", "CENTRED", "SINK"), ("SOFTCAP", "HIDES", "CONSTANT"), ()],
    ids=str,
)
@pytest.mark.parametrize("rows", [64, 4096])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("name", list(FORMATS))
def test_variants_compile(name, dim, rows, variants):
    for arch in (80, 90):
        check(name, torch.bfloat16, dim, arch, *variants, rows=rows)
