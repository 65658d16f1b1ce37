"""Journals that were torn, databases, and what cannot be opened."""

import sys
from dataclasses import replace

import optuna
import psutil
import pytest

from kvpolicy import StudyError
from kvpolicy.tuning import storage
from kvpolicy.tuning.storage import open_storage, repair_journal
from tests.tuning.searches import make_settings, run, states, the_study


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_journal_line_is_cut_and_the_file_kept(tmp_path, cut):
    settings = make_settings(tmp_path, trials=2)
    run(settings)
    content = settings.journal.read_bytes().replace(b'"pid":%d' % psutil.Process().pid, b'"pid":4194309')
    torn = content[:-cut]  # by a process that is gone: no number is above 2^22
    settings.journal.write_bytes(torn)
    assert repair_journal(settings.journal)
    assert settings.journal.read_bytes() == content[: content[:-1].rfind(b"\n") + 1]
    assert settings.journal.with_name("plan.json.study.bak").read_bytes() == torn
    assert not repair_journal(settings.journal), "nothing is left to repair"
    run(replace(settings, resume=True, trials=3))
    assert states(the_study(settings)).count("COMPLETE") == 3


def test_a_whole_journal_is_left_alone(tmp_path):
    settings = make_settings(tmp_path, trials=1)
    run(settings)
    content = settings.journal.read_bytes()
    assert not repair_journal(settings.journal)
    assert settings.journal.read_bytes() == content
    assert not list(tmp_path.glob("*.bak"))
    assert not repair_journal(tmp_path / "none.study")


def test_a_database_works_and_needs_no_journal(tmp_path):
    settings = make_settings(tmp_path, storage=f"sqlite:///{tmp_path / 'study.db'}")
    plan = run(settings)
    assert plan.provenance["trials"] == 3
    assert (tmp_path / "study.db").stat().st_size > 0
    assert settings.journal is None and not (tmp_path / "plan.json.study").exists()
    run(replace(settings, resume=True, trials=4))
    assert states(the_study(settings)) == ["COMPLETE"] * 4


@pytest.mark.parametrize(
    "url", ["nosuch://x", "sqlite:////no/such/folder/s.db", "postgresql://nobody@127.0.0.1:1/x"], ids=lambda x: x[:6]
)
def test_a_storage_that_cannot_be_opened_is_refused(tmp_path, url):
    with pytest.raises(StudyError, match="cannot open the study storage"):
        run(make_settings(tmp_path, storage=url))


def test_a_storage_whose_driver_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StudyError, match=r"needs a package that is not installed .* pip install 'psycopg\[binary\]'"):
        run(make_settings(tmp_path, storage="postgresql://nobody@127.0.0.1:1/x"))


def test_a_database_that_another_process_is_just_creating_is_tried_again(monkeypatch):
    tried = []

    def creating(url):
        tried.append(url)
        if len(tried) == 1:
            raise RuntimeError("duplicate key value violates unique constraint")
        return optuna.storages.InMemoryStorage()

    monkeypatch.setattr(storage, "get_storage", creating)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    assert isinstance(open_storage("postgresql://host/kv"), optuna.storages.InMemoryStorage)


def test_a_missing_driver_is_named_with_what_to_install(monkeypatch):
    def missing(url):
        raise ImportError("Failed to import DB access module")

    monkeypatch.setattr(storage, "get_storage", missing)
    with pytest.raises(StudyError, match=r"needs a package that is not installed .*psycopg\[binary\]"):
        open_storage("postgresql://host/kv")
