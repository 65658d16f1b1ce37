"""The HTML reports: what they hold, and that a real browser shows them without a fault and without a request."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from kvpolicy.budget.plan import load_plan
from kvpolicy.comparison.results_file import Comparison, Row
from kvpolicy.report.comparison_html import comparison_html
from kvpolicy.report.html import plan_html
from kvpolicy.report.kept_tokens import KeptTokens, kept_tokens_html

ROOT = Path(__file__).parents[1]
PLAN = load_plan(ROOT / "benchmarks" / "results" / "budgets_h100" / "power.json")
CHROMIUM = shutil.which("chromium")
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt install chromium")
HOSTILE = "</title><script>document.title = 'owned'</script><img src=http://127.0.0.1:9/x>"


def sample() -> KeptTokens:
    kept = torch.zeros(2, 3, 40, dtype=torch.bool)
    kept[:, :, :4] = True
    kept[1, 2, 30:] = True
    return KeptTokens([" a", "<b>", "\n", "文"] * 10, kept, (0, 5), 0.25)


def comparison() -> Comparison:
    made = [("full", 1.0, 200, 2.0), ("snapkv/uniform", 0.5, 100, 2.1), (HOSTILE, 0.5, 100, 2.2)]
    rows = [
        Row(name, kept, {}, "snapkv/uniform", losses=(loss, loss + 0.1, loss - 0.1), bytes=held, dense_bytes=200)
        for name, kept, held, loss in made
    ]
    broken = Row("h2o/uniform", 0.5, {}, "", error="no luck")
    return Comparison({"task": "perplexity", "seed": 0}, {"model": "m"}, {x.key: x for x in (*rows, broken)})


def test_a_plan_shows_quality_over_bytes_and_its_search() -> None:
    page = plan_html(PLAN)
    assert page.count("<circle") == 8, "four levels, of the plan and of uniform"
    assert "this plan: 5 % kept, 1.15 kB a token, 36.913" in page and "full cache, 32.920" in page
    assert "The search" not in page, "this plan was made before trials were kept"
    PLAN.provenance["history"] = [{"retention": 0.5, "loss_minus_uniform": [-0.01, None, 0.02]}, "nonsense"]
    try:
        page = plan_html(PLAN)
    finally:
        del PLAN.provenance["history"]
    assert page.count("<circle") == 10 and "50 % kept: trial 3, +0.0200" in page
    assert ">2</text>" in page and ">1.5</text>" not in page, "there is no trial 1.5"


def test_what_is_kept_is_drawn_as_it_is() -> None:
    page = kept_tokens_html(sample())
    assert page.count("<path") == 6 and "layer 5, KV head 2: 14 of 40 kept" in page
    assert 'd="M0 20h4v3h-4zM30 20h10v3h-10z"' in page
    assert "&lt;b&gt;" in page and page.count("6 of 6 KV heads keep it") == 4


def test_a_comparison_shows_each_row_with_its_interval() -> None:
    page = comparison_html(comparison())
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<circle") == 2 and "snapkv/uniform: 50 % kept, 100 B, +10.52%" in page
    assert "failed: no luck" in page and "50 % kept</h2>" in page


def test_compare_writes_its_report(kvpolicy, tiny_checkpoint, tiny_text, tmp_path) -> None:
    run = ["--model", tiny_checkpoint, "--text", tiny_text, "--context", "64", "--limit", "2", "-r", "0.5"]
    out, html = tmp_path / "c.json", tmp_path / "c.html"
    result = kvpolicy("compare", "streaming", *run, "--no-timing", "--out", out, "--html", html)
    assert result.code == 0, result.err
    assert "streaming/uniform: 50 % kept" in html.read_text(encoding="utf-8")


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_tune_writes_a_report_with_a_prompt_that_was_kept(
    kvpolicy, tiny_checkpoint, tiny_text, tmp_path, policy
) -> None:
    run = ["--model", tiny_checkpoint, "--text", tiny_text, "--context", "64", "--trials", "2", "-r", "0.5"]
    html = tmp_path / "plan.html"
    result = kvpolicy("tune", *run, "--policy", policy, "--out", tmp_path / "plan.json", "--html", html)
    assert result.code == 0, result.err
    page, plan = html.read_text(encoding="utf-8"), load_plan(tmp_path / "plan.json")
    (history,) = plan.provenance["history"]
    assert len(history["loss_minus_uniform"]) == 2
    tokens = 64 if policy == "streaming" else 32
    assert f"{tokens} tokens of held-out text, 50 % kept" in page
    kept = [int(part.split(" of ")[0].rpartition(" ")[2]) for part in page.split("<title>") if " kept</title>" in part]
    assert sum(kept) == int(plan.capacities(tokens, 0.5).sum()), "the map is that of a real cache"


@BROWSER
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("report", ["plan", "comparison"])
def test_a_browser_shows_it_without_a_fault_or_a_request(tmp_path: Path, report: str, width: int) -> None:
    page = plan_html(PLAN, sample()) if report == "plan" else comparison_html(comparison())
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    log, picture = tmp_path / "net.json", tmp_path / "page.png"
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000", f"--screenshot={picture}",
            f"--log-net-log={log}", "--enable-logging=stderr", (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, "nothing is said at the console"
    asked = {event.get("params", {}).get("url", "") for event in json.loads(log.read_text())["events"]}
    assert not [url for url in asked if url.startswith(("http", "ws")) and ("127.0.0.1" in url or "page" in url)]
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, 3000)
    assert picture.stat().st_size > 40_000, "more than an empty page"
