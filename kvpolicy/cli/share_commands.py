"""`kvpolicy push` and `kvpolicy pull`: plans on the Hugging Face Hub, or in a directory in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import turning
from kvpolicy.errors import PlanError


def push(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    target: Annotated[str, typer.Argument(help="A Hub id (owner/name), or a directory.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository for its owner alone.")] = False,
    config: opt.Config = None,
    json: opt.Json = False,
) -> None:
    """Share a plan: plan.json and a page of its own figures, in a repository of the Hugging Face Hub or a directory.

    A repository is made where there is none. Whoever is logged in writes: hf auth login, or HF_TOKEN.
    """
    from kvpolicy.budget.plan import load_plan

    loaded = load_plan(plan)
    with turning(f"pushing {plan} to {target}"):
        commit = loaded.push_to_hub(target, private=private)
    if json:
        opt.print_json({"plan": str(plan), "target": target, "commit": commit or None})
        return
    from kvpolicy.cli.terminal import Console

    pinned = f"; anyone gets this very plan with: kvpolicy pull {target} --revision {commit}" if commit else ""
    Console().print(f"pushed {plan} to {target}{pinned}", soft_wrap=True)


def pull(
    source: Annotated[str, typer.Argument(help="A Hub id (owner/name), or a directory.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where the plan is written; a file of another content stays.")] = Path(
        "plan.json"
    ),
    config: opt.Config = None,
    json: opt.Json = False,
) -> None:
    """Get a plan that somebody shared. Only its JSON is fetched and checked; nothing of it runs, no model is loaded."""
    from kvpolicy.budget.plan import load_plan, pull_plan, save_plan
    from kvpolicy.verbs import arguments

    arguments.check_writable(out)
    with turning(f"pulling the plan of {source}"):
        plan, place = pull_plan(source, revision)
    if out.exists() and load_plan(out).sha256 != plan.sha256:
        raise PlanError(f"{out} is another plan already: name another file with --out")
    save_plan(plan, out)
    if json:
        levels = list(plan.retentions)
        opt.print_json({"plan": str(out), "source": source, "commit": place.commit or None, "retentions": levels})
        return
    from kvpolicy.cli.terminal import Console

    Console().print(f"{out} is the plan of {place}; look at it with: {opt.program()} show {out}", soft_wrap=True)
