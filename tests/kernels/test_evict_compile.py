"""The kernels compile to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest

pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.evict import kernel

from tests.kernels.compiling import compiled

TYPES = {"scores_ptr": "*fp32", "positions_ptr": "*i32", "num_heads": "i32", "recent_window": "i32", "num_parts": "i32"}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("num_spans", [1, 3])
def test_evict_compiles(num_spans, scored, arch):
    function = kernel._evict_kernel
    types = dict.fromkeys(function.arg_names, "*i64") | TYPES | {"spans": (("i32", "i32"),) * num_spans}
    constants = {"NUM_SPANS": num_spans, "HAS_SCORES": scored, "HAS_ROWS": scored, "IS_SPLIT": True}
    constants |= {"BLOCK": kernel.CONFIG["BLOCK"]} | ({} if scored else {"scores_ptr": None, "rows_ptr": None})
    code = compiled(function, arch, constants, types, [], kernel.CONFIG["num_warps"], 3)
    assert code.spilled == 0
    assert "atom" not in code.ptx


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("num_parts", [2, kernel.PROGRAMS])
def test_merge_compiles(num_parts, arch):
    function = kernel._merge_kernel
    types = dict.fromkeys(function.arg_names, "*i64") | TYPES
    config = kernel.merge_config(num_parts)
    constants = {"BLOCK_P": config["BLOCK_P"], "HAS_ROWS": True}
    code = compiled(function, arch, constants, types, [], config["num_warps"], 3)
    assert code.spilled == 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("num_spans", [1, 3])
def test_rank_compiles(num_spans, scored, arch):
    function = kernel._rank_kernel
    numbers = dict.fromkeys(("stride_ss", "stride_fb", "heads_seen", "width", "num_columns"), "i32")
    types = dict.fromkeys(function.arg_names, "*i64") | TYPES | numbers | {"spans": (("i32", "i32"),) * num_spans}
    constants = {"NUM_SPANS": num_spans, "HAS_SCORES": scored, "HAS_FRESH": scored, "BLOCK": kernel.CONFIG["BLOCK"]}
    constants |= {} if scored else {"scores_ptr": None, "fresh_ptr": None}
    assert compiled(function, arch, constants, types, [], kernel.CONFIG["num_warps"], 3).spilled == 0
