"""The end of `make demo`: the plan that was just searched beside the recommended one, on the same model and text.

python docs/examples/demo.py PLAN RECOMMENDED PICTURE

Both compress the same prompts once, to equal bytes. No search has seen these texts.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

import kvpolicy
from kvpolicy.budget.plan import BudgetPlan, policy_of
from kvpolicy.cli.terminal import Console
from kvpolicy.cli.watch import duration, watcher
from kvpolicy.comparison.methods import FULL, Method
from kvpolicy.comparison.task import Measured, PerplexityTask, RetrievalTask, Task
from kvpolicy.measure.evaluation import CacheBytes
from kvpolicy.progress import Progress
from kvpolicy.report.grid import Grid
from kvpolicy.report.numbers import percent, size
from kvpolicy.tasks.questions import make_passkeys

TEXTS, FACTS, RETENTION = 4, 10, 0.3


@dataclass(frozen=True)
class Line:
    """One way to fill a cache. origin: where its plan comes from;  facts: numbers that were found, of `FACTS`"""

    name: str
    origin: str
    perplexity: float
    facts: int
    memory: CacheBytes


def main(own: Path, recommended: Path, picture: Path) -> None:
    searched, learned = kvpolicy.load_plan(own), kvpolicy.load_plan(recommended)
    retention = min(searched.retentions, key=lambda kept: abs(kept - RETENTION))
    lines = measure(searched, learned, retention)
    console = Console()
    console.print()
    console.print(table(lines, f"{searched.model.id}, {percent(retention)} of each prompt kept"))
    console.print(
        f"A prompt of {searched.provenance['context_length']} tokens is compressed once. Perplexity: of as much text "
        f"behind it, {TEXTS} times, from Python's language reference, where no search saw it. Facts: numbers asked for "
        f"at the end of {FACTS} other prompts. Cache: its bytes behind a prompt. The recommended plan was learned "
        f"behind prompts of {learned.provenance['prefill_length']} tokens, and suits much shorter ones less."
    )
    draw(lines).savefig(picture)
    program = Path(sys.executable).with_name("kvpolicy")
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    console.print(f"\nThe same as a picture: {picture}. The search itself: {shown} show {own}", soft_wrap=True)
    console.print("Next, an answer over the recommended cache:\n", soft_wrap=True)
    text = "--prompt-file docs/explanation/roles.md --max-new-tokens 32"
    console.print(f"  {shown} generate {recommended} -r {retention} {text}", soft_wrap=True)


def measure(searched: BudgetPlan, learned: BudgetPlan, retention: float) -> list[Line]:
    """The full cache and both plans, on texts and facts."""
    context = int(searched.provenance["context_length"])
    model, tokenizer = kvpolicy.load_model(searched.model.id, dtype=searched.provenance["dtype"])
    texts = kvpolicy.read_corpus(tokenizer).sequences("heldout", TEXTS, 2 * context)
    tasks: list[Task] = [
        PerplexityTask(model, texts, prefill_length=context),
        RetrievalTask("passkey", model, tokenizer, make_passkeys(tokenizer, FACTS, context, seed=0)),
    ]
    policy = learned.method.policy.name, policy_of(learned)
    window = searched.method.policy.name, policy_of(searched)
    ways = [  # the full cache under a policy whose prompts are run anyway
        (Method(FULL, *policy), "everything is kept"),
        (Method("recommended", *policy, plan=learned), f"learned on novels, {took(learned, retention)} of a GPU"),
        (Method("BaKlaVa", *window, plan=searched), f"searched here, {took(searched, retention)}"),
    ]
    progress, lines = watcher(quiet=False), []
    progress.begin("side by side", len(tasks) * len(ways))
    for method, origin in ways:
        of_text, of_facts = (measured(task, method, retention, progress) for task in tasks)
        found = FACTS - int(of_facts.losses.sum())
        lines.append(Line(method.name, origin, math.exp(float(of_text.losses.mean())), found, of_text.memory))
    progress.end()
    full, recommended, own = lines
    return [full, own, recommended]


def measured(task: Task, method: Method, retention: float, progress: Progress) -> Measured:
    answer = task.measure(method, lambda context: method.table(task.spec, context, retention, 0, task.dtype))
    progress.advance(f"{task.name} of {method.name}")
    return answer


def took(plan: BudgetPlan, retention: float) -> str:
    """The time that was spent on a level, profiling included."""
    costs = plan.provenance.get("calibration", [])
    return duration(sum(cost["seconds"] for cost in costs if cost["retention"] in (None, retention)))


def table(lines: list[Line], title: str) -> Grid:
    full = lines[0].perplexity
    rows = [
        [
            line.name,
            f"{line.perplexity:.3f}" + ("" if line is lines[0] else f" ({line.perplexity / full - 1:+.1%})"),
            f"{line.facts} of {FACTS}",
            size(line.memory.bytes),
            line.origin,
        ]
        for line in lines
    ]
    return Grid(["", "perplexity", "facts", "cache", "plan"], rows, title=title, words=["plan"])


def draw(lines: list[Line]) -> Figure:
    """Three bars for each method: what it costs, what it keeps, what it takes."""
    figure = Figure(figsize=(9.0, 2.4), dpi=130, layout="constrained")
    full = lines[0]
    panels = {
        "perplexity added, %": [100 * (line.perplexity / full.perplexity - 1) for line in lines],
        "facts found, %": [100 * line.facts / FACTS for line in lines],
        "cache, MB": [line.memory.bytes / 1e6 for line in lines],
    }
    for axes, (label, values) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        bars = axes.barh([line.name for line in lines], values, color=["0.6", "C1", "C0"])
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis() if axes is figure.axes[0] else None
    return figure


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except kvpolicy.KVPolicyError as error:
        sys.exit(f"demo: {error}")
