"""The head to head with peers, at tiny size and without them: what their environment has to offer stands in here."""

import csv
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture
def head_to_head(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import head_to_head

    yield head_to_head
    for name in ("head_to_head", "conversation", "peers_picture"):
        sys.modules.pop(name, None)


def test_one_command_writes_every_peer_into_one_file(head_to_head, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    asked, out = [], tmp_path / "peers.csv"

    def run(command, **options):
        python, script, task = map(Path, command)
        assert script.exists()
        asked.append((python.name, json.loads(task.read_text())))
        tool = {"kvpress_side": "kvpress 0.5.5", "vllm_side": "vLLM 0.27.1"}[script.stem]
        row = {"tool": tool, "method": "snapkv", "kept": 0.5, "n": 2, "score": 0.0}
        row |= {"ms_a_token": 3.0, "second_turn": 0.0, "bytes": 4, "transformers": python.name}
        return type(
            "Done", (), {"stdout": f"a warning\n{json.dumps(row)}\n", "returncode": 3 * (python.name == "python-c")}
        )

    monkeypatch.setattr(head_to_head.subprocess, "run", run)
    monkeypatch.setattr(head_to_head, "METHODS", (("snapkv", "uniform"), ("snapkv", "adakv"), ("nothing", "uniform")))
    monkeypatch.setattr(head_to_head, "QUANTIZED", ("fp8",))
    command = ["--model", tiny_checkpoint, "--context", 260, "--limit", 2, "--retentions", 0.5, "--new-tokens", 2]
    command += ["--kvpress", "python-a", "python-b", "--vllm", "python-c", "--no-timing", "--out", out]
    monkeypatch.setattr(sys, "argv", ["head_to_head.py", *map(str, command)])
    head_to_head.main()
    with out.open(newline="") as file:
        rows = {(row["tool"].split()[0], row["method"]): row for row in csv.DictReader(file)}
    assert [python for python, _ in asked] == ["python-a", "python-b", "python-c"]
    assert asked[0][1]["retentions"] == [0.5] and len(asked[0][1]["prompts"]) == 2
    assert rows["kvpress", "snapkv"]["transformers"] == "python-b" and rows["vLLM", "snapkv"]["bytes"] == "4"
    assert rows["vLLM", "all"]["error"] == "vllm_side.py ended with 3"
    assert rows["kvpress", "snapkv"]["score"] == "0.0" and "ms_a_token" not in rows["kvpress", "snapkv"]
    dense, ours = rows["transformers", "DynamicCache"], rows["kvpolicy", "snapkv"]
    assert float(ours["bytes"]) < 0.6 * float(dense["bytes"]) < int(ours["peak_bytes"])
    padded = (dense, rows["transformers", "sliding layers"], ours, rows["kvpolicy", "snapkv/adakv"])
    assert [row["padded_batch"] for row in padded] == ["equal"] * 4
    assert rows["transformers", "DynamicCache, offloaded"]["error"], "offloading needs a GPU"
    assert "nothing" in rows["kvpolicy", "nothing"]["error"]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_what_the_docs_say_of_peers_on_a_gpu_is_what_was_measured():
    root = FOLDER.parents[1]
    with (root / "benchmarks" / "results" / "peers_h200.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["error"]]
    page = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    lines = page.split("\n### On an H200\n")[2].split("\n## ")[0].splitlines()
    dense = float(rows[0]["bytes"])
    for row in rows:
        said = [
            f"| {row['tool'].replace(' 0.5.5', '')}, ",
            f"| {float(row['score']) * int(row['n']):.0f} of {row['n']} |",
        ]
        said += [f"| {int(float(row['bytes'])):,}".replace(",", " "), f"| {100 * float(row['bytes']) / dense:.1f} % |"]
        said += [f"| {float(row['first_token_seconds']):.2f} s | {float(row['ms_a_token']):.1f} ms |"]
        assert any(all(part in line for part in said) for line in lines), said
    assert len(rows) == 15
