"""The kernels compile to machine code for sm_80 and sm_90 on a machine without a GPU."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.attention.plan import unit_of  # noqa: E402
from kvpolicy_kernels.encoded_attention import kernel as kernels  # noqa: E402
from kvpolicy_kernels.encoded_attention.exact.kernel import _exact_kernel, exact_config  # noqa: E402
from kvpolicy_kernels.encoded_attention.finish.kernel import _finish_kernel, finish_config  # noqa: E402
from kvpolicy_kernels.encoded_attention.programs import PROGRAMS_PER_SM  # noqa: E402
from kvpolicy_kernels.encoded_attention.turn.kernel import _turn_kernel, turn_config  # noqa: E402
from kvpolicy_kernels.formats import FORMATS, block_of  # noqa: E402

from tests.kernels.compiling import SHARED_MEMORY, coefficients, compiled  # noqa: E402

WIDE_LOAD = r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x10"  # of 16 bytes
FLOATS = ("scale_log2", "softcap_log2", "tanh_scale")


def compile_attend(name, dtype, dim, arch, *variants, rows=4, ones=()):
    """variants: names of what the launch has besides, such as "SOFTCAP";  ones: arguments that are 1, a constant."""
    planes = FORMATS[name].codes_in_word
    config = kernels.launch_config(dtype, dim, planes, rows, "CENTRED" in variants)
    warps = config.pop("num_warps")
    constants = {
        "D": dim, "DV": dim, "KW_ROW": dim // planes, "VW_ROW": dim // planes, "KS_ROW": 1, "VS_ROW": 1,
        "UNIT": unit_of(dim), "PLANES": planes, "PACKED": dtype != torch.float32,
        "BLOCK_W": kernels.plane_block(dim, planes), "BLOCK_WV": kernels.plane_block(dim, planes), "EARLY": arch >= 90,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", "ROOMY": True,
        "HIDES": "HIDES" in variants, "COEFFICIENTS": coefficients(variants), "BLOCK_C": 16, **config,
        **{f"HAS_{x}": x in variants for x in ("SOFTCAP", "SINK", "LOGITS")},
    }  # fmt: skip
    belongs = {"sink_ptr": "SINK", "logits_ptr": "LOGITS"}
    belongs |= dict.fromkeys(("positions_ptr", "since_ptr"), "HIDES")
    constants |= {pointer: None for pointer, variant in belongs.items() if variant not in variants}
    if not coefficients(variants):
        constants |= dict.fromkeys(("of_centre_ptr", "frequency_ptr"))
    if "CENTRED" in variants:
        constants.pop("positions_ptr", None)
    constants |= dict.fromkeys(ones, 1)
    types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in kernels._attend_kernel.arg_names}
    types |= {"q_ptr": "*fp32" if dtype == torch.float32 else "*fp16", "kw_ptr": "*i16", "vw_ptr": "*i16"}
    types |= dict.fromkeys(("sums_ptr", "of_centre_ptr", "part_ptr"), "*fp32")
    types |= dict.fromkeys(("part_lse_ptr", "logits_ptr", "sink_ptr"), "*fp32")
    types |= dict.fromkeys(("starts_ptr", "lengths_ptr"), "*i64") | dict.fromkeys(FLOATS, "fp32")
    aligned = [x for x in types if x.endswith("_ptr") and x != "quantum_ptr" and x not in constants]
    return compiled(kernels._attend_kernel, arch, constants, types, aligned, warps, 3)


FAST = [("int4", torch.bfloat16, 128, 80), ("int4", torch.bfloat16, 128, 90), ("int8", torch.bfloat16, 128, 90)]
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
    kernel = compile_attend(name, dtype, dim, arch, "HIDES", "CENTRED")
    assert "mma" in kernel.ptx, "the products must run on tensor cores"
    assert kernel.shared * (PROGRAMS_PER_SM if dim <= 128 else 7) <= SHARED_MEMORY[arch]  # side by side
    assert dim == 80 or re.search(WIDE_LOAD, kernel.ptx)
    assert ("griddepcontrol.launch_dependents" in kernel.ptx) == (arch >= 90)
    if dtype != torch.float32:
        assert kernel.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "variants",
    [("SOFTCAP", "SINK"), ("LOGITS", "HIDES", "CENTRED"), ("HIDES", "CONSTANT"), ()],
    ids=str,
)
@pytest.mark.parametrize("rows", [4, 32])
@pytest.mark.parametrize("name", list(FORMATS))
def test_variants_compile(name, rows, variants):
    assert compile_attend(name, torch.bfloat16, 128, 90, *variants, rows=rows).spilled == 0


@pytest.mark.slow
def test_attention_compiles_for_one_of_everything():
    ones = ("num_segments", "num_kv_heads", "group", "n", "num_entries", "num_sinks")
    assert compile_attend("int4", torch.bfloat16, 64, 90, "HIDES", ones=ones).spilled == 0


def compile_beside(kernel, config, constants, types, arch):
    """A launch before or behind the loop, without a pointer that is None among the constants."""
    warps = config.pop("num_warps")
    constants = constants | config | {"EARLY": arch >= 90}
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names} | types
    aligned = [x for x in types if (x.startswith("stride_") or x.endswith("_ptr")) and x not in constants]
    aligned = [x for x in aligned if x not in ("mask_ptr", "stride_mb", "stride_mn")]
    return compiled(kernel, arch, constants, types, aligned, warps, 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", [128, 80, 256])
def test_turn_compiles(dim, arch):
    constants = {
        "D": dim, "PLANES": 4, "TURN_BLOCK": block_of(dim), "TURN_SCALE": 0.125, "BLOCK_C": 64, "ROTATED": True,
        "COEFFICIENTS": 17, "PACKED": True, "HIDES": True, "BEHIND": arch >= 90,
    }  # fmt: skip
    types = {"q_ptr": "*bf16", "signs_ptr": "*i8", "out_ptr": "*fp16", "scale_log2": "fp32"}
    types |= dict.fromkeys(("copies_ptr", "since_ptr"), "*i32")
    assert compile_beside(_turn_kernel, turn_config(dim, 4), constants, types, arch).spilled == 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dim", "masked"), [(128, True), (256, False)])
def test_exact_part_compiles(dim, masked, arch):
    constants = {
        "D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "HAS_MASK": masked, "HAS_SOFTCAP": False,
        "PRECISION": "tf32",
    }  # fmt: skip
    constants |= {} if masked else {"mask_ptr": None}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16") | dict.fromkeys(FLOATS, "fp32") | {"mask_ptr": "*i32"}
    assert compile_beside(_exact_kernel, exact_config(torch.bfloat16, dim), constants, types, arch).spilled == 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dim", "beside"), [(128, True), (256, False)])
def test_finish_compiles(dim, beside, arch):
    constants = {"DV": dim, "TURN_BLOCK": dim, "TURN_SCALE": 0.125, "ROTATED": True, "HAS_LSE": True}
    constants |= {"HAS_EXACT": beside}
    constants |= {} if beside else {"exact_ptr": None, "exact_lse_ptr": None}
    types = {"out_ptr": "*bf16", "signs_ptr": "*i8", "pieces_ptr": "*i32"}
    assert compile_beside(_finish_kernel, finish_config(18, dim), constants, types, arch).spilled == 0
