"""What becomes of a graph whose recording failed, told without a GPU."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from kvpolicy.integrations.transformers.cache import cuda_graph


class Graph:
    def __init__(self, ends):
        self.ends = ends

    def capture_end(self):
        if not self.ends:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("ends", [True, False])
def test_a_graph_lives_on_where_its_recording_did_not_end(monkeypatch, ends):
    """torch's allocators have its address; one that has ended would keep its memory."""
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_graph, "_FAILED", [])
    graph = Graph(ends)
    known = weakref.ref(graph)
    cuda_graph._give_up(graph)
    del graph
    assert (known() is None) == ends
