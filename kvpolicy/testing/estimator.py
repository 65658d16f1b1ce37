"""The laws of an importance estimator."""

from __future__ import annotations

from kvpolicy.model.spec import Importance
from kvpolicy.plugins.roles import ImportanceEstimator, ModelProbe
from kvpolicy.testing.laws import (
    call,
    hold,
    hold_float32,
    hold_not_negative,
    hold_same,
    hold_tensor,
    instance_of,
    tensors_of,
)
from kvpolicy.testing.synthetic import SyntheticProbe


def check_estimator(
    estimator: ImportanceEstimator | type[ImportanceEstimator], probe: ModelProbe | None = None
) -> None:
    """Checks the laws of `ImportanceEstimator`.

    probe: where activations come from; by default two synthetic models, one with grouped queries and one without.
    Raises `LawError`, an `AssertionError`.
    """
    instance: ImportanceEstimator = instance_of("estimator", estimator)
    ungrouped = SyntheticProbe(num_layers=2, num_q_heads=4, num_kv_heads=4, lengths=(20,), seed=1)
    for source in [SyntheticProbe(), ungrouped] if probe is None else [probe]:
        layers, heads = source.spec.table_shape
        case = f"a model of {layers} layers with {heads} KV heads, {source.spec.group_size} query heads to each"
        ran = source.forwards if isinstance(source, SyntheticProbe) else None
        first = call(instance, "estimate", case, instance.estimate, source)
        if isinstance(source, SyntheticProbe) and ran is not None:
            _check_forwards(instance, case, source, source.forwards - ran)
        _check_importance(instance, case, first, (layers, heads))
        second = call(instance, "estimate", case, instance.estimate, source)
        for (name, a), (_, b) in zip(tensors_of(first), tensors_of(second), strict=True):
            hold_same(instance, f"importance {name}", case, a, b)
        if instance.token_measure:
            _check_maps(instance, case, source)


def _check_forwards(estimator: ImportanceEstimator, case: str, probe: SyntheticProbe, ran: int) -> None:
    count = len(probe.prompts)  # its losses are those of as many sequences
    most = estimator.num_forwards(probe.spec, prompts=count, sequences=count)
    law = f"estimate runs at most num_forwards(spec, prompts={count}, sequences={count}) = {most} forwards"
    advice = "override num_forwards: `prompts` for each time they are observed, `sequences` for each call of loss"
    hold(ran <= most, estimator, law, case, ran, advice)


def _check_maps(estimator: ImportanceEstimator, case: str, probe: ModelProbe) -> None:
    maps = call(estimator, "token_maps", case, estimator.token_maps, probe)
    count = len(probe.prompts)
    law = f"token_maps returns a map for each of {count} prompts"
    advice = "return as many as the probe has prompts, or set token_measure to ''"
    hold(isinstance(maps, list) and len(maps) == count, estimator, law, case, type(maps).__name__, advice)
    layers, heads = probe.spec.num_budgeted_layers, probe.spec.num_q_heads
    for prompt, values in zip(probe.prompts, maps, strict=True):
        expected = (layers, heads, len(prompt))
        hold_tensor(estimator, "the token map", case, values, expected, "[L, num_q_heads, n]")
        hold_float32(estimator, "the token map", case, values)


def _check_importance(plugin: object, case: str, result: object, shape: tuple[int, int]) -> None:
    law = "estimate returns an Importance"
    advice = "return kvpolicy.Importance(per_head=...)"
    hold(isinstance(result, Importance), plugin, law, case, type(result).__name__, advice)
    assert isinstance(result, Importance)
    expected = {"per_head": (shape, "[L, H]"), "per_layer": (shape[:1], "[L]")}
    if result.curve_capacities is not None:  # Importance has checked the shape itself
        expected["curves"] = ((*shape, len(result.curve_capacities)), "[L, H, K]")
    for name, value in tensors_of(result):
        if name in expected:
            hold_tensor(plugin, f"importance {name}", case, value, *expected[name])
            hold_float32(plugin, f"importance {name}", case, value)
            hold_not_negative(plugin, f"importance {name}", case, value)
