"""Decoding from the first token on, as `kvpolicy eval` measures it under a window rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpolicy.comparison.methods import Method, check_decodes
from kvpolicy.comparison.task import Measured, Tables, Task
from kvpolicy.integrations.transformers import TransformersProbe
from kvpolicy.measure.evaluation import measured_bytes
from kvpolicy.model.spec import ModelSpec


class DecodingTask(Task):
    """The loss of sequences of which every token is decoded under the budget (`TransformersProbe`): no prompt comes
    first. Tables are for whole sequences. For methods under a window rule and the full cache alone.

    sequences: int64 [N, T], of which tokens from T // 4 on are scored
    """

    name = "perplexity"
    protocol = "window"

    def __init__(self, model: Any, sequences: Tensor, *, batch_size: int = 1) -> None:
        self.model, self.sequences, self.batch_size = model, sequences, batch_size
        self.count, self.context = len(sequences), int(sequences.shape[1])
        self.spec = ModelSpec.from_config(model.config)

    @property
    def described(self) -> str:
        return f"{self._probe(num_sink_tokens=0).described}; a cache is weighed and timed behind a whole sequence"

    @property
    def tokens(self) -> Tensor:
        return self.sequences

    def measure(self, method: Method, tables: Tables) -> Measured:
        """Raises `PluginError` for a method that keeps others than the most recent entries."""
        check_decodes(method)
        own = {"entry_format": method.entry_format, "shared_layers": method.shared_layers}
        probe, table = self._probe(method.policy.num_sink_tokens, **own), tables(self.context)
        return Measured(probe.loss(table), measured_bytes(probe, table))

    def _probe(self, num_sink_tokens: int, **own: Any) -> TransformersProbe:
        """own: the method's"""
        options: dict[str, Any] = {"num_sink_tokens": num_sink_tokens, "batch_size": self.batch_size, **own}
        return TransformersProbe(self.model, self.sequences, **options)
