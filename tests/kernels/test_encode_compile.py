"""The kernel compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.append_encoded.kernel import _append_encoded_kernel
from kvpolicy_kernels.encode import kernel
from kvpolicy_kernels.formats import FORMATS

from tests.kernels.compiling import NAMES, compiled

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "dims", "arch"),
    [
        ("int4", (128, 80), 90),
        pytest.param("int4", (128, 80), 80, marks=slow),
        *(
            pytest.param(name, dims, arch, marks=slow)
            for name in FORMATS
            for dims in ((64, 64), (256, 256))
            for arch in (80, 90)
        ),
    ],
    ids=str,
)
def test_encode_compiles(name, dims, arch):
    config = kernel.launch_config()
    warps = config.pop("num_warps")
    constants = {
        "DIMS": dims, "TURN_SCALES": (0.125, 0.125), "PLANES": FORMATS[name].codes_in_word,
        "ROTATED": FORMATS[name].rotated, "SINGLES": (False, False), **config,
    }  # fmt: skip
    types = {"row_ptrs": (f"*{NAMES[torch.bfloat16]}",) * 2, "turn_ptrs": ("*i8",) * 2, "word_ptrs": ("*i16",) * 2}
    types |= {"scale_ptrs": ("*fp16",) * 2, "counts": ("i32",) * 2}
    assert compiled(kernel._encode_kernel, arch, constants, types, [], warps, 3).spilled == 0


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=slow)])
@pytest.mark.parametrize("dim", [128, pytest.param(256, marks=slow), pytest.param(80, marks=slow)])
def test_append_encoded_compiles(dim, arch):
    config = kernel.launch_config()
    warps = config.pop("num_warps")
    constants = {
        "DIMS": (dim, dim), "TURN_SCALES": (0.125, 0.125), "PLANES": 4, "ROTATED": True, "COEFFICIENTS": 17,
        "HAS_COPIES": True, "FAST": True, "PRECISION": "tf32", **config,
    }  # fmt: skip
    types = {"rows_ptr": "*i64", "positions_ptr": "*i64", "entry_ptrs": ("*bf16",) * 2, "turn_ptrs": ("*i8",) * 2}
    types |= {"word_ptrs": ("*i16",) * 2, "scale_ptrs": ("*fp16",) * 2, "arena_ptrs": ("*i32", "*fp32")}
    types |= {"number_ptrs": ("*i64", "*fp32"), "copy_ptrs": ("*bf16",) * 2, "copied_ptr": "*i32"}
    types |= dict.fromkeys(("count", "heads", "centres", "slots", "num_sinks"), "i32")
    types |= {"centre_ptr": "*fp32", "frequency_ptr": "*i32"}
    assert compiled(_append_encoded_kernel, arch, constants, types, [], warps, 3).spilled == 0
