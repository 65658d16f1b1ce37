"""The kernel compiles to machine code for sm_80 and sm_90 on a machine without a GPU."""

import pytest

pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.rebuild import kernel

from tests.kernels.compiling import SHARED_MEMORY, machine_code

ALIGNED = [["tt.divisibility", 16]]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dims", [(64, 64), (128, 80)])
@pytest.mark.parametrize(("has_held", "has_fresh"), [(True, True), (False, True), (True, False)])
def test_rebuild_compiles(has_held, has_fresh, dims, arch):
    """Keys and values, positions and scores, from an arena, from a chunk and from both."""
    function = kernel._rebuild_kernel
    config = kernel.launch_config(dims, 2)
    place = {name: index for index, name in enumerate(function.arg_names)}
    constants = {name: value for name, value in config.items() if name in place}
    constants |= {"DIMS": dims, "NUMBERS": 2, "HAS_HELD": has_held, "HAS_FRESH": has_fresh}
    strides = ("i32", "i32", "i32", "constexpr")
    constants |= {(place["fresh_strides"], i, 3): 1 for i in range(2)} if has_fresh else {}
    types = dict.fromkeys(("stride_cs", "width", "num_heads"), "i32")
    types |= {"out_ptrs": ("*bf16",) * 2, "out_strides": ("i32",) * 2}
    for name, there, kinds in (("held", has_held, ("i32",) * 2), ("fresh", has_fresh, (strides,) * 2)):
        if there:
            types |= {f"{name}_ptrs": ("*bf16",) * 2, f"{name}_strides": kinds}
        else:
            constants |= {f"{name}_ptrs": None, f"{name}_strides": None}
    types |= {"number_ptrs": ("*i32", "*fp32"), "table_ptrs": ("*i64", "*fp32"), "table_strides": ("i32",) * 2}
    signature = {name: "constexpr" if name in constants else types.get(name, "*i64") for name in place}
    attributes = {(place["out_ptrs"], i): ALIGNED for i in range(2)}
    attributes |= {(place["out_strides"], i): ALIGNED for i in range(2)}
    for name, there in (("held", has_held), ("fresh", has_fresh)):
        attributes |= {(place[f"{name}_ptrs"], i): ALIGNED for i in range(2 * there)}
    attributes |= {(place["held_strides"], i): ALIGNED for i in range(2 * has_held)}
    attributes |= {(place["fresh_strides"], i, j): ALIGNED for i in range(2 * has_fresh) for j in range(3)}
    binary = machine_code(function, arch, signature, constants, attributes, config["num_warps"], 3)
    assert binary.spilled == 0
    assert binary.shared <= SHARED_MEMORY[arch]
    assert "st.global.v4" in binary.ptx, "16 bytes a thread"
