"""Recordings share memory, whatever became of others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kvpolicy_vllm.recorded import RecordedWork

MIB = 1 << 20


class Pools:
    """What torch's graphs do with a pool: it goes with the last graph, and its memory belongs to a stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.users: dict[int, int] = {}
        self.parts: set[tuple[int, int]] = set()  # a pool and a stream
        self.streams: list[int] = []
        pools = self

        class Graph:
            pool = None

            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert pools.users.get(pool) != 0, "this pool is gone"
                self.pool = pool
                pools.users[pool] = pools.users.get(pool, 0) + 1
                pools.parts.add((pool, pools.streams[-1]))

            def capture_end(self) -> None: ...

            def replay(self) -> None:
                assert self.pool is not None

            def __del__(self) -> None:
                pools.users[self.pool] -= 1

        class Stream:
            made = 0

            def __init__(self, device: torch.device) -> None:
                Stream.made += 1
                self.number = Stream.made

            def wait_stream(self, other: Any) -> None: ...

        def stream(entered: Stream) -> nullcontext[None]:
            self.streams.append(entered.number)
            return nullcontext()

        handles = iter(range(1, 100))
        fakes: dict[str, Any] = {
            "is_current_stream_capturing": lambda: False,
            "current_stream": Stream,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": stream,
            "graph_pool_handle": lambda: next(handles),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_recordings_are_of_one_pool_and_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, recorded, done = Pools(monkeypatch), RecordedWork(), []
    for key in (1, 2, 1, 3, 2, 2, 3, 1):
        recorded.do(key, lambda key=key: done.append(key), torch.device("cuda"))
    assert done == [1, 2, 1, 3, 2, 3]  # as it is, and while it is recorded
    assert len(pools.parts) == 1
    assert list(pools.users.values()) == [3]


def test_a_recording_that_failed_alone_takes_its_pool_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, recorded = Pools(monkeypatch), RecordedWork()
    recorded.do("fails", lambda: None, torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        recorded.do("fails", lambda: 1 / 0, torch.device("cuda"))  # type: ignore[arg-type,return-value]
    for _ in range(3):
        recorded.do("holds", lambda: None, torch.device("cuda"))
    assert sorted(pools.users.values()) == [0, 1]


def adds_one(to: torch.Tensor) -> Callable[[], None]:
    """With memory of its size on the way."""

    def work() -> None:
        to.copy_(to + 1)

    return work


@pytest.mark.gpu
def test_on_a_gpu_recordings_take_the_memory_of_one() -> None:
    recorded, total = RecordedWork(), torch.zeros(4 * MIB, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        for key in range(40):
            recorded.do(key, adds_one(total), total.device)
    assert total.unique().tolist() == [120]
    assert torch.cuda.memory_reserved() - before < 100 * MIB  # 16 for each, and rounded up


@pytest.mark.gpu
def test_on_a_gpu_recordings_that_are_gone_stop_no_others() -> None:
    for _ in range(2):
        recorded, total = RecordedWork(), torch.zeros(MIB, device="cuda")
        for key in (1, 2, 1, 2, 2, 1):
            recorded.do(key, adds_one(total), total.device)
        assert total.unique().tolist() == [6]
        del recorded
