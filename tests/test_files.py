"""Files that may be anything: nothing waits, nothing is read without end, nothing small costs much."""

import json
import os
import resource
import subprocess
import sys
import threading
import time

import pytest
from optuna.study import StudyDirection

from kvpolicy import BudgetPlan, KVPolicyError, PlanError, StudyError, load_cache, load_plan
from kvpolicy.cli.generate import _prompt
from kvpolicy.comparison.results_file import load_comparison
from kvpolicy.files.fields import MAX_BYTES, parse
from kvpolicy.files.regular import read_bytes, read_start
from kvpolicy.text.corpus import read_text
from kvpolicy.tuning.loss_journal import LossJournal
from kvpolicy.tuning.storage import open_storage
from tests.test_plan import make_plan
from tests.tiny import tiny_model

READERS = {
    "plan": load_plan,
    "comparison": load_comparison,
    "text": read_text,
    "prompt": lambda path: _prompt(None, path),
    "cache": lambda path: load_cache(tiny_model("Llama", layers=2), path),
    "study": open_storage,
    "losses": lambda path: LossJournal(path, {}, resume=True),
}


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_a_device_and_a_folder_are_refused_at_once(name, pipe, tmp_path):
    for path in (pipe, "/dev/zero", tmp_path):
        with pytest.raises(KVPolicyError, match=r"(?s)a pipe or a device is there|directory|no regular file") as raised:
            READERS[name](type(pipe)(path))
        assert "\n" not in str(raised.value)


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link", 3) == b"abc" and read_start(tmp_path / "link", 2) == b"ab"
    with pytest.raises(KVPolicyError, match="larger than 0 MiB"):
        read_bytes(tmp_path / "link", 2)


def test_of_a_huge_text_the_first_characters_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("kvpolicy.text.corpus._MAX_BYTES", 4)
    (tmp_path / "t.txt").write_text("aößx", encoding="utf-8")
    assert read_text(tmp_path / "t.txt") == ("t.txt", "aö"), "the sharp s is cut in half"


def seconds(call, *args):
    begun = time.process_time()
    with pytest.raises(PlanError) as raised:
        call(*args)
    return time.process_time() - begun, str(raised.value)


def test_twice_the_same_field_is_found_in_linear_time():
    names = ",".join(f'"{index}":0' for index in range(200_000))
    took, said = seconds(parse, f'{{{names},"199999":1}}'.encode())
    assert "field '199999' stands twice" in said and took < 2, "quadratic: minutes"


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 65 + b"]" * 65,
        b"[" * 200_000,
        b'{"a":' * 65,
        b'["\\\\",' + b"[" * 65,
        b'"' + b'\\"' * 2_000_000 + b"[" * 65,
    ],
    ids=["closed", "open", "objects", "behind an escape", "an open text"],
)
def test_depth_is_seen_before_parsing(data, monkeypatch):
    if not data.startswith(b'"'):
        monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    took, said = seconds(parse, data)
    assert ("nested deeper" in said) != data.startswith(b'"') and took < 2


def test_brackets_in_texts_are_no_depth():
    assert parse(json.dumps(["[" * 100, {'"[' * 80: "\\"}]).encode()) == ["[" * 100, {'"[' * 80: "\\"}]


def test_a_document_that_is_too_large_is_not_parsed():
    took, said = seconds(parse, b"[" + b"{}," * (MAX_BYTES // 3) + b"{}]")
    assert "larger than 8 MiB" in said and took < 0.5


def test_numbers_that_stand_for_much_are_refused_fast():
    document = make_plan().to_json()
    document["model"]["num_layers"] = 2**31 - 1
    took, said = seconds(BudgetPlan.from_json, document)
    assert "model.num_layers is 2147483647, expected a whole number from 1 to 10000" in said and took < 0.5
    document = make_plan().to_json()
    document["levels"] *= 5000
    took, said = seconds(BudgetPlan.from_json, document)
    assert "expected at most 1000" in said and took < 5


@pytest.mark.parametrize("room", [0, 20])
def test_a_journal_that_may_not_grow_loses_no_trial(tmp_path, room):
    path = tmp_path / "x.study"
    kept = open_storage(path)
    study_id = kept.create_new_study([StudyDirection.MINIMIZE], "x")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))  # as `ulimit -f`
    try:
        with pytest.raises(
            StudyError, match=r"cannot write the study .*x\.study: File too large; the trials before are"
        ):
            kept.create_new_trial(study_id)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before, "no torn line"
    kept.create_new_trial(study_id)
    assert len(open_storage(path).get_all_trials(study_id)) == 1


def test_a_lock_file_left_by_a_dead_process_holds_nobody_up(tmp_path):
    path = tmp_path / "x.study"
    (tmp_path / "x.study.lock").touch()
    begun = time.monotonic()
    open_storage(path).create_new_study([StudyDirection.MINIMIZE], "x")
    assert time.monotonic() - begun < 10, "30 s, and then it was broken"


HOLDER = """
import sys, time
from pathlib import Path
from kvpolicy.tuning.storage import _locked
with _locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    path = tmp_path / "x.study"
    kept = open_storage(path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    threading.Timer(0.5, holder.kill).start()
    begun = time.monotonic()
    kept.create_new_study([StudyDirection.MINIMIZE], "x")
    assert holder.wait(10) == -9, "it was waited for"
    assert time.monotonic() - begun < 10
    holder.stdout.close()
