"""The kernel of many queries over codes compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.encoded_attention.chunk.kernel import _attend_codes_kernel, launch_config  # noqa: E402
from kvpolicy_kernels.encoded_attention.kernel import plane_block  # noqa: E402
from kvpolicy_kernels.formats import FORMATS  # noqa: E402

from tests.kernels.compiling import SHARED_MEMORY, compiled  # noqa: E402

CONSUMER = 99 * 1024  # bytes of shared memory that a program may have on sm_86 and sm_89, whose code is that of sm_80


def compile_attend(name, dtype, dim, arch, *variants, rows=4096):
    """variants: names of what the launch has besides, such as "SOFTCAP"."""
    planes = FORMATS[name].codes_in_word
    config = launch_config(dtype, dim, rows, arch >= 90)
    warps = config.pop("num_warps")
    constants = {
        "GROUP": 4, "D": dim, "DV": dim, "KW_ROW": dim // planes, "VW_ROW": dim // planes, "KS_ROW": 1, "VS_ROW": 1,
        "PLANES": planes, "PACKED": dtype != torch.float32, "BLOCK_W": plane_block(dim, planes),
        "BLOCK_WV": plane_block(dim, planes), "COEFFICIENTS": 17 * ("CENTRED" in variants), "BLOCK_C": 16,
        "HAS_SOFTCAP": "SOFTCAP" in variants, "HAS_SINK": "SINK" in variants, "HIDES": "HIDES" in variants,
        "SPLIT": "SPLIT" in variants, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", **config,
    }  # fmt: skip
    belongs = {"sink_ptr": "SINK", "part_ptr": "SPLIT", "part_lse_ptr": "SPLIT", "since_ptr": "HIDES"}
    belongs |= dict.fromkeys(("of_centre_ptr", "frequency_ptr"), "CENTRED")
    constants |= {pointer: None for pointer, variant in belongs.items() if variant not in variants}
    if not {"HIDES", "CENTRED"} & set(variants):
        constants["positions_ptr"] = None
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in _attend_codes_kernel.arg_names}
    types |= {"q_ptr": "*fp32" if dtype == torch.float32 else "*fp16", "kw_ptr": "*i16", "vw_ptr": "*i16"}
    types |= dict.fromkeys(("ks_ptr", "vs_ptr", "positions_ptr", "since_ptr", "frequency_ptr"), "*i32")
    types |= dict.fromkeys(("starts_ptr", "lengths_ptr", "order_ptr"), "*i64")
    types |= dict.fromkeys(("softcap_log2", "tanh_scale"), "fp32")
    aligned = [x for x in types if x.endswith("_ptr") and x not in constants]
    return compiled(_attend_codes_kernel, arch, constants, types, aligned, warps, 3)
