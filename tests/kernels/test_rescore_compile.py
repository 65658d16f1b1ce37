"""The kernel compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest

pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.rescore import kernel

from tests.kernels.compiling import compiled

TYPES = {"scores_ptr": "*fp32", "new_ptr": "*fp32", "positions_ptr": "*i32", "fault_ptr": "*u8", "num_rows": "i32"}


@pytest.mark.parametrize("arch", [80, 90])
def test_rescore_compiles(arch):
    code = compiled(kernel._rescore_kernel, arch, {"BLOCK": kernel.BLOCK}, TYPES, [], 4, 3)
    assert code.spilled == 0
    assert "atom" not in code.ptx
