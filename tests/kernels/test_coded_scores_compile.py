"""The kernels compile to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.column_scores.codes import kernel  # noqa: E402
from kvpolicy_kernels.encoded_attention.kernel import plane_block  # noqa: E402
from kvpolicy_kernels.formats import FORMATS  # noqa: E402

from tests.kernels.compiling import SHARED_MEMORY, coefficients, compiled  # noqa: E402

KERNELS = (kernel._code_lse_kernel, kernel._code_mass_kernel)
PROMPT = 2**13  # rows
NUMBERS = ("softcap_log2", "tanh_scale", "power")


def compile_codes(which, name, dtype, dim, arch, *variants, num_rows=PROMPT, ones=()):
    """variants: names of what the launch has besides, such as "SOFTCAP";  ones: arguments that are 1, a constant."""
    function, planes = KERNELS[which], FORMATS[name].codes_in_word
    config = kernel.launch_config(dtype, dim, num_rows, coefficients(variants), arch >= 90)[which]
    constants = {
        "NUM_KV_HEADS": 2, "GROUP": 4, "D": dim, "KW_ROW": dim // planes, "KS_ROW": 1, "PLANES": planes,
        "PACKED": dtype != torch.float32, "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"],
        "BLOCK_W": plane_block(dim, planes), "COEFFICIENTS": coefficients(variants), "BLOCK_C": 16,
        "HAS_SOFTCAP": "SOFTCAP" in variants, "HIDES": "HIDES" in variants,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    if "HIDES" not in variants:
        constants |= dict.fromkeys(("since_ptr", "copies_ptr"))
    if not coefficients(variants):
        constants |= dict.fromkeys(("of_centre_ptr", "frequency_ptr"))
    if not {"HIDES", "CENTRED"} & {*variants}:
        constants["positions_ptr"] = None
    constants |= dict.fromkeys(ones, 1)
    types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in function.arg_names}
    types |= {"q_ptr": "*fp32" if dtype == torch.float32 else "*fp16", "kw_ptr": "*i16"}
    types |= dict.fromkeys(("sums_ptr", "of_centre_ptr", "lse_ptr", "part_ptr", "copies_ptr", "out_ptr"), "*fp32")
    types |= dict.fromkeys(("start_ptr", "length_ptr"), "*i64") | dict.fromkeys(NUMBERS, "fp32")
    constants = {name: x for name, x in constants.items() if name in function.arg_names}
    aligned = [x for x in function.arg_names if x.endswith("_ptr") and x not in constants]
    return compiled(function, arch, constants, types, aligned, config["num_warps"], config["num_stages"])


FAST = [("int4", torch.bfloat16, 128, 90), ("int8", torch.bfloat16, 128, 80)]
REST = [
    (name, dtype, dim, arch)
    for name in FORMATS
    for dtype, dim in (
        (torch.bfloat16, 128),
        (torch.bfloat16, 64),
        (torch.bfloat16, 80),
        (torch.float16, 256),
        (torch.float32, 128),
    )
    for arch in (80, 90)
]


@pytest.mark.parametrize("which", [0, 1], ids=lambda i: KERNELS[i].__name__)
@pytest.mark.parametrize(
    ("name", "dtype", "dim", "arch"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST if case not in FAST)],
    ids=str,
)
def test_coded_scores_compile(which, name, dtype, dim, arch):
    made = compile_codes(which, name, dtype, dim, arch, "HIDES", "CENTRED")
    assert "mma" in made.ptx, "the products must run on tensor cores"
    assert "cp.async.c" in made.ptx, "the walk must load ahead"
    assert made.shared <= SHARED_MEMORY[arch]
    if dtype != torch.float32:
        assert made.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=lambda i: KERNELS[i].__name__)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(
    "variants",
    [(), ("SOFTCAP",), ("HIDES",), ("HIDES", "CONSTANT"), ("SOFTCAP", "CONSTANT"), ("SOFTCAP", "HIDES", "CENTRED")],
    ids=str,
)
@pytest.mark.parametrize("num_rows", [7, PROMPT])
def test_variants_compile(which, arch, name, variants, num_rows):
    assert compile_codes(which, name, torch.bfloat16, 128, arch, *variants, num_rows=num_rows).spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=lambda i: KERNELS[i].__name__)
def test_coded_scores_compile_for_one_of_everything(which):
    ones = "num_sinks", "slots", "GROUP", "NUM_KV_HEADS"
    assert compile_codes(which, "int4", torch.bfloat16, 64, 90, "HIDES", ones=ones).spilled == 0
