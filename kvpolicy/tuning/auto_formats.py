"""`--format auto`: a format for each layer, for each level in closed form by measured curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvpolicy.budget.entry_format import OF_A_TOKEN, Format, check_format, least_entries, name_of, named, of_layers
from kvpolicy.budget.format_choice import FormatChoice, FormatCurves, choose_formats
from kvpolicy.cache.size import block_nbytes, entry_nbytes, holds_scores
from kvpolicy.cache.weight import byte_budget
from kvpolicy.errors import BudgetError
from kvpolicy.measure.delegate import DelegateProbe
from kvpolicy.plugins.roles import ModelProbe
from kvpolicy.tuning.job import Job
from kvpolicy.tuning.probes import Probes


class EveryFormat(DelegateProbe):
    """Asks an estimator of curves for all formats."""

    def __init__(self, probe: ModelProbe) -> None:
        super().__init__(probe)
        for name in OF_A_TOKEN:
            check_format(named(name), probe.spec)

    @property
    def formats(self) -> tuple[str, ...]:
        return OF_A_TOKEN


@dataclass(frozen=True, slots=True, eq=False)
class AutoFormats:
    """The job of each level, under the formats that are found for it: those of the closed form, or one for all layers,
    whichever has the lowest loss on the search's sequences under the capacities of the closed form.

    job:    of a search without formats, whose importance has curves of all of them
    probes: the search's and the held-out ones under a format
    """

    job: Job
    probes: Callable[[Format], tuple[Probes, Probes]]

    def __call__(self, level: float) -> Job:
        losses: dict[Format, float] = {}
        best = self.job
        for choice in self._choices(level):
            entry_format = of_layers([named(name) for name in choice.formats])
            search, heldout = self.probes(entry_format)
            job = replace(
                self.job, search=search, heldout=heldout, importance=replace(self.job.importance, curves=choice.curves)
            )
            table = job.table(choice.capacities.double(), level, search.target.context_length)
            losses[entry_format] = float(search.target.loss(table).mean())
            if losses[entry_format] == min(losses.values()):  # prompts that the others have run are let go of
                best = job
        self.job.progress.note(_sentence(losses, level))
        return best

    def _choices(self, level: float) -> list[FormatChoice]:
        """The closed form over all formats, and over each alone, as far as they go into the bytes."""
        job, importance = self.job, self.job.importance
        target, policy, dtype = job.search.target, job.method.policy, job.sizes.dtype
        assert importance.format_curves is not None and importance.curve_capacities is not None  # `measures_formats`
        scored, context = holds_scores(policy, None), target.context_length
        budget = byte_budget(level, job.spec, context, dtype, policy, None, scored=scored)
        curves = {}
        for name, losses in importance.format_curves.items():
            own = named(name)
            cost = entry_nbytes(job.spec, dtype, scored=scored, entry_format=own)
            fixed = block_nbytes(job.spec, dtype.itemsize, policy, own) // job.spec.num_budgeted_layers
            curves[name] = FormatCurves(losses, cost, fixed, least_entries(policy, own))
        choices: list[FormatChoice] = []
        refusal = None
        for names in (tuple(curves), *((name,) for name in curves)):
            try:
                choice = choose_formats(
                    {x: curves[x] for x in names}, importance.curve_capacities, budget.total, importance.together
                )
                if len(names) == 1 and int(choice.capacities.min()) == context:
                    continue  # everything goes in: less is to be found above
            except BudgetError as error:
                refusal = error
                continue
            if choice.formats not in [other.formats for other in choices]:
                choices.append(choice)
        if not choices:
            raise refusal or BudgetError(f"memory={level:g} holds a whole context: nothing is searched, give less")
        return choices


def _sentence(losses: dict[Format, float], level: float) -> str:
    each = "; ".join(f"{name_of(own)}: {loss:.4f}" for own, loss in losses.items())
    best = min(losses, key=lambda own: losses[own])
    return f"formats at {level:.0%} of the bytes: {name_of(best)} (loss on the search's sequences under {each})"
