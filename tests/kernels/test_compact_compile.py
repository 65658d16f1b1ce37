"""The kernels compile to machine code for sm_80 and sm_90 on a machine without a GPU."""

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is a Linux-only dependency")

from kvpolicy_kernels.compact import kernel  # noqa: E402
from triton import language as tl  # noqa: E402

from tests.kernels.compiling import SHARED_MEMORY, compiled, machine_code  # noqa: E402

ALIGNED = [["tt.divisibility", 16]]


def widths(ptx, what):
    """Bytes a thread moves by each load or store, such as 16 of `ld.global.v4.b32`."""
    found = re.findall(what + r"\.global\S*?(?:\.v(\d))?\.[bsuf](\d+) ", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def compile_compact(kind, dim, arch, is_chunk):
    config = kernel.launch_config(dim, 2)
    constants = {
        "stride_od": 1,
        "stride_sd": 1,
        "NUM_HEADS": 8,
        "D": dim,
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_D": config["BLOCK_D"],
        "IS_CHUNK": is_chunk,
        "INDEX": tl.int32,
    }
    names = kernel._compact_kernel.arg_names
    types = dict.fromkeys(names, "i32") | {"out_rows_ptr": "*i64", "source_rows_ptr": "*i64"}
    types |= {"out_ptr": kind, "source_ptr": kind}
    aligned = [
        name for name in names if name.endswith("_ptr") or (name.startswith("stride_") and name not in constants)
    ]
    return compiled(kernel._compact_kernel, arch, constants, types, aligned, config["num_warps"], 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dim", "is_chunk"), [(128, False), (128, True), (80, True)])
def test_compact_compiles(dim, is_chunk, arch):
    binary = compile_compact("*bf16", dim, arch, is_chunk)
    ptx = binary.ptx
    assert binary.spilled == 0
    assert binary.shared <= SHARED_MEMORY[arch]
    assert set(widths(ptx, "st")) == {16}
    assert set(widths(ptx, "ld")) == {8, 16}, "rows and tiles"
    assert ("div" in ptx) == is_chunk
    assert not re.search(r"(div|rem)\S*64", ptx), "a 64-bit division is slow"


@pytest.mark.parametrize("arch", [80, 90])
def test_compact_in_place_compiles(arch):
    """Keys, values and positions; every store of the loop stands behind a barrier, and every load before it."""
    function, kinds, dims = kernel._compact_in_place_kernel, ("*bf16", "*bf16", "*i32"), (128, 80, 1)
    config = kernel.in_place_config(dims, (2, 2, 4))
    place = {name: index for index, name in enumerate(function.arg_names)}
    constants = {name: value for name, value in config.items() if name in place} | {"DIMS": dims, "stride_cn": 1}
    row_strides = ("i32", "i32", "constexpr")
    constants |= {(place["arena_strides"], i, 1): 1 for i in range(3)} | {(place["arena_strides"], 2, 0): 1}
    types = {
        "stride_cs": "i32",
        "arena_ptrs": kinds,
        "arena_strides": tuple((stride, "constexpr") for stride in row_strides),
    }
    signature = {name: "constexpr" if name in constants else types.get(name, "*i64") for name in place}
    # pointers, and the strides of rows, as they are at a launch
    attributes = (
        {(place[name],): ALIGNED for name in ("starts_ptr", "columns_ptr", "counts_ptr")}
        | {(place["arena_ptrs"], i): ALIGNED for i in range(3)}
        | {(place["arena_strides"], i, 0): ALIGNED for i in range(2)}
    )
    options = config["num_warps"], config["num_stages"]
    binary = machine_code(function, arch, signature, constants, attributes, *options)
    ptx = binary.ptx
    assert binary.spilled == 0
    assert binary.shared <= SHARED_MEMORY[arch]
    assert set(widths(ptx, "st")) == {16, 4}, "keys and values, positions"
    assert set(widths(ptx, "ld")) == {8, 16, 4}, "columns too"
    assert "cp.async" not in ptx, "a pipelined loop would load behind the stores"
    order = " ".join(re.findall(r"ld\.global|st\.global|bar\.sync|barrier\.sync", ptx))
    assert len(re.findall(r"bar\S*( st\.global)+", order)) == len(dims)
    assert not re.search(r"ld\.global st\.global", order)
