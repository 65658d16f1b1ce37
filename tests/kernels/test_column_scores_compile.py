"""The kernels compile to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.column_scores import kernel  # noqa: E402

from tests.kernels.compiling import NAMES, SHARED_MEMORY, compiled  # noqa: E402

KERNELS = (kernel._row_lse_kernel, kernel._column_mass_kernel)
PROMPT = 2**20  # rows
TYPES = {"mask_ptr": "*i1", "start_ptr": "*i64", "length_ptr": "*i64"}


def compile_column_scores(which, dtype, dim, group, num_rows, arch, softcap=False, mask=False, row=None):
    """row: elements from one key to the next, where keys and values lie in one arena."""
    function, config = KERNELS[which], kernel.launch_config(dtype, dim, num_rows)[which]
    constants = {
        "NUM_KV_HEADS": 2,
        "GROUP": group,
        "D": dim,
        "K_ROW": row or dim,
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "HAS_SOFTCAP": softcap,
        "HAS_MASK": mask,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "stride_qd": 1,  # as a launch finds it where the last dimension is contiguous
        "stride_cd": 1,
        "stride_mn": 1,
    } | ({} if mask else {"mask_ptr": None})
    types = {}
    for name in function.arg_names:
        if name in ("q_ptr", "k_ptr", "c_ptr"):
            types[name] = f"*{NAMES[dtype]}"
        elif name.endswith("_ptr"):
            types[name] = TYPES.get(name, "*fp32")
        else:
            types[name] = "fp32" if name in ("scale_log2", "softcap_log2", "tanh_scale", "power") else "i32"
    aligned = [
        name
        for name in types.keys() - constants.keys()
        if name.endswith("_ptr") or name.startswith(("stride_q", "stride_c"))
    ]
    return compiled(function, arch, constants, types, aligned, config["num_warps"], config["num_stages"])


@pytest.mark.parametrize("which", [0, 1], ids=lambda i: KERNELS[i].__name__)
@pytest.mark.parametrize(
    ("dtype", "dim", "group", "num_rows", "arch", "options"),
    [
        (torch.bfloat16, 128, 4, PROMPT, 80, {"softcap": True, "mask": True}),
        (torch.bfloat16, 128, 4, PROMPT, 90, {}),
        (torch.float16, 256, 5, PROMPT, 80, {}),
        (torch.float16, 80, 3, 3, 90, {"softcap": True}),
        (torch.float32, 128, 7, PROMPT, 80, {}),
        (torch.bfloat16, 128, 4, PROMPT, 90, {"row": 256}),
    ],
    ids=str,
)
def test_column_scores_compiles(which, dtype, dim, group, num_rows, arch, options):
    out = compile_column_scores(which, dtype, dim, group, num_rows, arch, **options)
    ptx = out.ptx
    assert len(out.cubin) > 0
    assert "mma" in ptx, "the products must run on tensor cores"
    assert "cp.async.cg" in ptx, "the walk must load ahead, sixteen bytes at a time"
    assert out.shared <= SHARED_MEMORY[arch]
    if dtype != torch.float32:  # three tf32 passes need more registers than there are; see launch_config
        assert out.spilled == 0
