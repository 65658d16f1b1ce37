"""`kvpolicy doctor`: what is found on this machine, and what of it is wrong."""

from __future__ import annotations

from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import turning


def doctor_command(device: opt.Device = "auto", config: opt.Config = None, json: opt.Json = False) -> int:
    """Look at the driver, the libraries, the kernels, the models, the plugins and the disk. No model is loaded.

    A note explains how kvpolicy behaves here. What is wrong is to be put right; the exit code is then 2.
    """
    with turning("looking at the libraries, the models, the plugins and the disk"):
        from kvpolicy.verbs.doctor import doctor

        diagnosis = doctor(device)
    if json:
        opt.print_json(diagnosis.to_json())
        return 0 if diagnosis.is_well else 2
    from rich.text import Text

    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.grid import Grid

    styles = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    rows = [(found.name, Text(found.status, style=styles[found.status]), found.text) for found in diagnosis.findings]
    Console().print(Grid(["what", "is", "found"], rows, words=["found"]))
    wrong = sum(found.status == "wrong" for found in diagnosis.findings)
    Console().print(f"{wrong} of {len(rows)} are wrong" if wrong else "nothing is wrong")
    return 2 if wrong else 0
