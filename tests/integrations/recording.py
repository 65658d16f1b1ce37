"""A recording that needs no GPU: what a CUDA graph does, and what it does not do, with Python run in its place."""

import torch

from kvpolicy.integrations.transformers.cache import replays


class Recorded:
    """Runs the work again, and puts back what a graph would not have touched: everything on the host."""

    def __init__(self, cache, work):
        self.cache, self.work = cache, work
        self.out, self.replays = work(), 0

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # done while it was recorded
            return
        restore = self.cache.bookmark()
        out = self.work()
        restore()
        for name, value in out.items():
            if isinstance(value, torch.Tensor):
                self.out[name].copy_(value)


def record_on_cpu(monkeypatch):
    """Lets caches on the CPU decode as on a GPU. Returns the list of what is recorded from now on."""
    recorded, cache_of = [], []
    run = replays.Replays.run

    def running(self, cache, *args):
        cache_of[:] = [cache]
        return run(self, cache, *args)

    def record(work, device):
        recorded.append(Recorded(cache_of[0], work))
        return recorded[-1], recorded[-1].out

    monkeypatch.setattr(replays.Replays, "run", running)
    monkeypatch.setattr(replays, "record", record)
    monkeypatch.setattr(replays, "unrecordable", lambda device: None)
    return recorded
