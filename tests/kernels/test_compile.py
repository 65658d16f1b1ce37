"""Every kernel compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.window_attention.kernel import _window_attention_kernel, launch_config  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

POINTERS = ("q_ptr", "k_ptr", "v_ptr", "o_ptr")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compiled(dtype, dim, group, arch, softcap, sinks):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs the interpreter")
    config = launch_config(dtype, dim)
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
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
    signature = {}
    for name in _window_attention_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = f"*{NAMES[dtype]}"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name == "window_ptr" else "*fp32"
        else:
            signature[name] = "fp32" if name in ("scale_log2", "softcap_log2", "tanh_scale") else "i32"
    aligned = [name for name in signature if name.endswith("_ptr") or name.startswith("stride_")]
    places = {name: index for index, name in enumerate(_window_attention_kernel.arg_names)}
    source = ASTSource(
        fn=_window_attention_kernel,
        signature=signature,
        constexprs=constants,
        attrs={(places[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spilled_bytes(ptx, arch, folder):
    """What ptxas reports for the kernel."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    ptxas = triton.knobs.nvidia.ptxas.path
    name = f"sm_{arch}a" if f".target sm_{arch}a" in ptx else f"sm_{arch}"
    command = [ptxas, "-v", f"--gpu-name={name}", str(path), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", list(NAMES), ids=str)
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (80, 1), (128, 4), (256, 2)])
def test_window_attention_compiles(dtype, dim, group, arch, tmp_path):
    kernel = compiled(dtype, dim, group, arch, softcap=False, sinks=False)
    assert len(kernel.asm["cubin"]) > 0
    assert "mma" in kernel.asm["ptx"], "the products must run on tensor cores"
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    if dtype != torch.float32:  # three tf32 passes need more registers than there are; see launch_config
        assert spilled_bytes(kernel.asm["ptx"], arch, tmp_path) == 0


@pytest.mark.parametrize(("softcap", "sinks"), [(True, False), (False, True)])
def test_window_attention_variants_compile(softcap, sinks, tmp_path):
    kernel = compiled(torch.bfloat16, 128, 4, 90, softcap, sinks)
    assert kernel.metadata.shared <= SHARED_MEMORY[90]
    assert spilled_bytes(kernel.asm["ptx"], 90, tmp_path) == 0
