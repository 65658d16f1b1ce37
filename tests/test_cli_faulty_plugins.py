"""Verbs with a plugin that fails or prints: one line and exit code 2, one document and nothing else."""

import json
import os
import subprocess

import pytest
import torch

from tests.command_line import FAST, KVPOLICY
from tests.faulty_plugin import Allocator, offer

TUNE = ["--policy", "faulty", "--retention", "0.5", "--trials", "2"]
GENERATE = ["generate", "uniform", "--retention", "0.5", "--min-tokens", "4", "--prompt", "one two three four"]
ONE_HEAD = "estimate returned torch.float32 of shape (1, 1), expected an Importance"


@pytest.fixture
def acme(tmp_path, monkeypatch):
    offer(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (
            ["profile", "--estimator", "faulty", "--param", "where=estimate"],
            "estimator 'faulty' of acme 1.2: Estimator",
        ),
        (["profile", "--estimator", "faulty", "--param", "how=one head"], ONE_HEAD),
        (["profile", "--estimator", "faulty", "--param", "where=num_forwards"], "num_forwards raised SystemExit: 0"),
        (["tune", *TUNE, "--policy-param", "where=score_prompt"], "policy 'faulty' of acme 1.2: Policy.score_prompt"),
        (["tune", *TUNE, "--policy-param", "num_sink_tokens=-1"], "`num_sink_tokens` is -1, expected an int >= 0"),
        (["eval", "uniform", "--policy", "unmakeable", "--retention", "0.5"], "policy 'unmakeable' of acme 1.2 cannot"),
    ],
)
def test_a_faulty_plugin_is_one_line(refused, acme, tiny_checkpoint, tiny_text, verb, said):
    out = ["--out", acme / "plan.json"] if verb[0] == "tune" else []
    assert said in refused(*verb, *out, "--model", tiny_checkpoint, "--text", tiny_text, *FAST, "--quiet")


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (lambda *_: exit(0), "allocator 'faulty' of acme 1.2: Allocator.shares raised SystemExit: 0"),
        (lambda _, __, budget: torch.full(budget.shape, torch.nan), "Allocator.shares returned nan at [0, 0]"),
        (lambda _, __, budget: torch.full(budget.shape, -1.0), "Allocator.shares returned -1.0 at [0, 0]"),
    ],
)
def test_shares_that_are_none_end_the_search(refused, acme, tiny_checkpoint, tiny_text, monkeypatch, shares, said):
    monkeypatch.setattr(Allocator, "shares", shares)
    where = ["--model", tiny_checkpoint, "--text", tiny_text, "--out", acme / "plan.json"]
    assert said in refused("tune", *where, "--allocator", "faulty", "--retention", "0.5", *FAST, "--quiet")
    assert not (acme / "plan.json").exists()


def test_json_is_one_document_also_while_a_policy_prints(kvpolicy, acme, tiny_checkpoint):
    arguments = [*GENERATE, "--policy", "leaving", "--model", tiny_checkpoint, "--dtype", "float32", "--json"]
    failed = kvpolicy(*arguments, "--max-new-tokens", "8")
    assert (failed.code, failed.out) == (2, "")
    assert "scoring\n" in failed.err
    assert "policy 'leaving' of acme 1.2: Leaving.score_step raised SystemExit: 0" in failed.errors[0]
    done = kvpolicy(*arguments, "--max-new-tokens", "1")
    assert (done.code, done.json["policy"]) == (0, "leaving")
    assert "scoring\n" in done.err


def test_plugins_shows_what_cannot_be_made(kvpolicy, acme):
    rows = {row["name"]: row for row in kvpolicy("plugins", "--json").json if row["distribution"] == "acme"}
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {"faulty": "ok", "unmakeable": "broken", "leaving": "ok"}
    assert "raises SystemExit: 0" in rows["unmakeable"]["error"]


def test_json_is_one_document_whoever_prints(acme):
    module = acme / "acme_plugin.py"
    printing = ["print('Python')", "sys.__stdout__.write('held\\n')", "os.write(1, b'C\\n')", "os.system('echo child')"]
    module.write_text("\n".join(["import os, sys", *printing, module.read_text()]))
    path = os.pathsep.join([str(acme), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*KVPOLICY, "plugins", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in json.loads(done.stdout) if row["name"] == "unmakeable"] == ["broken"]
    assert {"Python", "C", "child", "held"} <= set(done.stderr.splitlines())
