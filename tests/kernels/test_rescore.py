import os

import pytest
import torch
from kvpolicy_kernels.rescore import rescore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
NAN, INF = float("nan"), float("inf")


def rescored(new, positions, backend, fault=False):
    new = torch.tensor(new, dtype=torch.float32, device=DEVICE)
    scores, flag = torch.full_like(new, NAN), torch.tensor(fault, device=DEVICE)
    rescore(scores, new, torch.tensor(positions, dtype=torch.int32, device=DEVICE), flag, backend=backend)
    return scores.tolist(), bool(flag)


@backends
def test_free_rows_score_nothing_and_raise_no_fault(backend):
    assert rescored([1.5, NAN, -INF, 3.0, INF], [4, -1, 0, -1, 7], backend) == ([1.5, -INF, -INF, -INF, INF], False)


@backends
@pytest.mark.parametrize("at", [0, 1023, 1024, 2500])
def test_a_number_that_is_none_is_noticed(at, backend):
    new = [0.0] * 2501
    assert not rescored(new, range(2501), backend)[1]
    new[at] = NAN
    assert rescored(new, range(2501), backend)[1]


@backends
def test_a_fault_stays(backend):
    assert rescored([1.0], [0], backend, fault=True) == ([1.0], True)
    assert rescored([], [], backend, fault=True) == ([], True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": torch.zeros(4)}, "new contiguous float32"),
        ({"scores": torch.zeros(3).double()}, "scores contiguous float32"),
        ({"scores": torch.zeros(6)[::2]}, "scores contiguous float32"),
        ({"positions": torch.zeros(3)}, "positions contiguous int"),
        ({"fault": torch.zeros(1, dtype=torch.bool)}, r"fault bool \[\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "scores": torch.zeros(3),
        "new": torch.zeros(3),
        "positions": torch.zeros(3, dtype=torch.int32),
        "fault": torch.tensor(False),
    }
    with pytest.raises(ValueError, match=message):
        rescore(**arguments | change)
