import ast
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from kvpolicy_kernels import backend as module
from kvpolicy_kernels.backend import uses_triton

HERE = torch.zeros(1)
KERNELS = sorted(Path(module.__file__).parent.rglob("kernel.py"))


def test_auto_is_torch_on_a_cpu():
    assert not uses_triton("op", "auto", HERE)
    assert not uses_triton("op", "torch", HERE)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_triton_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="op: backend='triton' cannot do this: Triton runs on CUDA tensors, got cpu"):
        uses_triton("op", "triton", HERE)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="one of auto, torch, triton, got 'cuda'"):
        uses_triton("op", "cuda", HERE)


def test_what_a_kernel_cannot_do_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert uses_triton("op", "triton", HERE)
    with pytest.raises(ValueError, match="cannot do this: 17 queries, 16 at most"):
        uses_triton("op", "triton", HERE, "17 queries, 16 at most")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(module, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        uses_triton("op", "triton", HERE)


def test_triton_is_looked_for_once(monkeypatch):
    looked = []
    monkeypatch.setattr(module, "find_spec", looked.append)
    module._has_triton.cache_clear()
    for _ in range(3):
        assert not uses_triton("op", "auto", HERE)
    module._has_triton.cache_clear()  # it has heard that there is no triton
    assert looked == ["triton"]


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu():
    cuda = torch.zeros(1, device="cuda")
    assert uses_triton("op", "auto", cuda)
    assert not uses_triton("op", "auto", cuda, "entry masks")
    assert not uses_triton("op", "torch", cuda)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Of the first one, which may stand in a sequence or behind what is left out."""
    places = []
    monkeypatch.setattr(module, "_several_devices", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: places.append(tensor) or nullcontext())
    launch = module.on_its_device(lambda *_, power=1: power)
    first, second = torch.zeros(1), torch.zeros(1)
    for arguments in ((first, second), (None, first, second), ([first], second), ((1, (first,)), second)):
        assert launch(*arguments, power=3) == 3
        assert places.pop() is first


@pytest.mark.parametrize("kernel", KERNELS, ids=[".".join(path.parts[-3:-1]) for path in KERNELS])
def test_no_function_of_a_kernel_is_called_without_its_device(kernel):
    functions = [node for node in ast.parse(kernel.read_text()).body if isinstance(node, ast.FunctionDef)]
    called = [node for node in functions if node.name.startswith("triton_")]
    assert all(ast.unparse(node.decorator_list[-1]) == "on_its_device" for node in called)
