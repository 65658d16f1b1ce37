"""Passwords of study storages are readable nowhere."""

import pytest

from kvpolicy import StudyError, TuneSettings
from kvpolicy.tuning import storage
from kvpolicy.tuning.storage import open_storage, storage_errors
from kvpolicy.tuning.storage_url import hidden, shown

SECRET = "p%40ss:w0rd"  # quoted: an @
URLS = [
    (f"postgresql://user:{SECRET}@host:5432/kv", "postgresql://***@host:5432/kv", "p@ss:w0rd"),
    ("postgresql://user:x@host/kv?sslpassword=hunter2", "postgresql://***@host/kv?***", "hunter2"),
    ("mysql://host/kv?password=hunter2", "mysql://host/kv?***", "hunter2"),
    ("mysql://u:hunter2/x@host/kv", "mysql://***", "hunter2/x"),
    ("mysql://u:hunter2?x@host/kv", "mysql://***", "hunter2?x"),
    ("sqlite:///runs/study.db", "sqlite:///runs/study.db", None),
    ("grpc://host:13000", "grpc://host:13000", None),
    ("plan@home/plan.json.study", "plan@home/plan.json.study", None),
]


@pytest.mark.parametrize(("url", "expected", "secret"), URLS, ids=range(len(URLS)))
def test_a_storage_is_shown_without_its_secrets(url, expected, secret):
    assert shown(url) == expected
    assert secret is None or hidden(f"no {url}; '{secret}'?", url) == f"no {expected}; '***'?"


@pytest.mark.parametrize("error", [RuntimeError, ImportError])
def test_no_error_holds_the_password(monkeypatch, error):
    url = f"postgresql://user:{SECRET}@host/kv"

    def failing(_):
        raise error(f"no way to {url} with 'p@ss:w0rd'")

    monkeypatch.setattr(storage, "get_storage", failing)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    with pytest.raises(StudyError, match=r"postgresql://\*\*\*@host/kv") as raised:
        open_storage(url)
    assert "w0rd" not in str(raised.value) and raised.value.__cause__ is None and raised.value.__suppress_context__
    said = r"the study storage postgresql://\*\*\*@host/kv failed: .*lost \*\*\*"
    with pytest.raises(StudyError, match=said), storage_errors(url):
        raise storage.StorageInternalError(f"lost {SECRET}")
    assert "w0rd" not in repr(TuneSettings(storage=url))


def test_the_command_line_shows_no_password(refused, tiny_checkpoint, tiny_text, tmp_path):
    options = ["--model", tiny_checkpoint, "--text", tiny_text, "--out", tmp_path / "plan.json", "--context", "64"]
    line = refused("tune", *options, "--storage", "postgresql://nobody:hunter2@127.0.0.1:1/x")
    assert "cannot open the study storage postgresql://***@127.0.0.1:1/x" in line and "hunter2" not in line
