"""LongBench's rows from a Hub on this machine, one member of an archive, at one commit; and its prompts, one file."""

import hashlib
import io
import json
import zipfile

import pytest

from kvpolicy import TextError
from kvpolicy.tasks import longbench_archive, longbench_prompts
from kvpolicy.tasks.longbench import LongBenchTask
from tests.fake_hub import fake_hub, use_hub
from tests.tiny_checkpoint import tiny_tokenizer

ROW = {"input": "Question: Who? Type:", "context": "Question: Why? Type: reason", "answers": ["person"]}
ROW |= {"all_classes": ["person", "reason"]}
PROMPT = "Sort.\n{context}\n{input}"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def prompts(monkeypatch, tmp_path):
    """The file of prompts where LongBench's repository has it."""
    path = tmp_path / "repository" / longbench_prompts.NAME
    path.parent.mkdir()
    path.write_text(json.dumps({"trec": PROMPT}))
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(longbench_prompts, "ADDRESS", path.as_uri())
    monkeypatch.setattr(longbench_prompts, "DIGEST", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def publish(monkeypatch, tmp_path, prompts):
    """publish(member=content, ...): a Hub whose archive has these members; publish(archive=bytes)"""
    with fake_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        hub.repositories[longbench_archive.REPOSITORY] = []

        def call(members, archive=None):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
                for name, content in members.items():
                    made.writestr(name, content)
            files = {"data.zip": archive or file.getvalue(), "LongBench.py": b"raise SystemExit"}
            monkeypatch.setattr(longbench_archive, "COMMIT", hub.commit(longbench_archive.REPOSITORY, files))
            return hub

        yield call


def test_rows_are_fetched_once_at_one_commit(publish, tokenizer, tmp_path):
    hub = publish({"data/trec.jsonl": json.dumps(ROW), "../evil.jsonl": "{}", "data/x.py": "raise SystemExit"})
    (sample,) = LongBenchTask("trec").samples(tokenizer, 5, 4000, 0)
    assert tokenizer.decode(sample.context + sample.questions[0]) == PROMPT.format(**ROW)
    assert sample.turns[0].classes == ("person", "reason")
    place = f"/datasets/zai-org/LongBench/resolve/{longbench_archive.COMMIT}/data.zip"
    assert {asked.split()[1] for asked in hub.asked if "/resolve/" in asked} == {place}
    hub.asked.clear()
    LongBenchTask("trec").samples(tokenizer, 5, 4000, 0)
    assert not [asked for asked in hub.asked if "/resolve/" in asked]  # it was in the cache
    assert not [*tmp_path.rglob("*.jsonl"), *tmp_path.rglob("*.py")]  # nothing is taken out of the archive


def test_eval_reads_them_without_a_folder(publish, kvpolicy, tiny_checkpoint):
    publish({"data/trec.jsonl": json.dumps(ROW)})
    run = ["eval", "uniform", "--retention", "0.5", "--model", tiny_checkpoint, "--limit", "1", "--context", "300"]
    told = kvpolicy(*run, "--task", "longbench/trec", "--json")
    assert told.code == 0, told.err
    assert (told.json["task"], told.json["n"], told.json["metric"]) == ("longbench/trec", 1, "accuracy")


@pytest.mark.parametrize(
    ("members", "archive", "reason"),
    [
        ({"data/lcc.jsonl": "{}"}, None, r"cannot read data/trec\.jsonl of .*data\.zip: KeyError: "),
        ({}, b"no archive", r"cannot read data/trec\.jsonl of .*data\.zip: BadZipFile: "),
        ({"data/trec.jsonl": '{"input": "x"}\n{"in'}, None, r"data/trec\.jsonl of .*LongBench, line 2: no complete"),
        ({"data/trec.jsonl": ""}, None, r"data/trec\.jsonl of zai-org/LongBench has no rows"),
    ],
)  # fmt: skip
def test_an_archive_of_another_kind_is_one_line(publish, tokenizer, members, archive, reason):
    publish(members, archive)
    with pytest.raises(TextError, match=reason):
        LongBenchTask("trec").samples(tokenizer, 1, 4000, 0)


def test_sizes_have_limits(publish, tokenizer, monkeypatch):
    publish({"data/trec.jsonl": " " * 2**21 + json.dumps(ROW)})
    monkeypatch.setattr(longbench_archive, "MAX_BYTES", 2**20)
    with pytest.raises(TextError, match="has more than the 1 MiB that are read of it"):
        LongBenchTask("trec").samples(tokenizer, 1, 4000, 0)
    publish({"data/trec.jsonl": json.dumps(ROW)})
    monkeypatch.setattr(longbench_archive, "_MOST_BYTES", 0)
    with pytest.raises(TextError, match=r"data\.zip of zai-org/LongBench is larger than the 0 MiB"):
        LongBenchTask("trec").samples(tokenizer, 1, 4000, 0)


def test_without_a_hub_the_folder_is_asked_for(monkeypatch, tmp_path, tokenizer):
    use_hub(monkeypatch, "http://no-such-host.invalid", tmp_path)
    with pytest.raises(TextError) as told:
        LongBenchTask("trec_e").samples(tokenizer, 1, 4000, 0)
    said = str(told.value)
    assert said.startswith("longbench/trec_e: cannot fetch data.zip of the data set zai-org/LongBench from the Hugging")
    assert said.endswith(". Give the folder that holds trec_e.jsonl, data=DIR") and "\n" not in said


def test_prompts_are_fetched_once(prompts):
    assert longbench_prompts.prompt_of("longbench/trec", "trec", "") == PROMPT
    prompts.unlink()
    assert longbench_prompts.prompt_of("longbench/trec", "trec", "") == PROMPT


def test_a_copy_that_was_damaged_is_fetched_again(prompts, tmp_path):
    longbench_prompts.prompt_of("longbench/trec", "trec", "")
    (copy,) = (tmp_path / "ours").rglob(longbench_prompts.NAME)
    copy.write_text('{"trec": "Lie."}')
    assert longbench_prompts.prompt_of("longbench/trec", "trec", "") == PROMPT


def test_prompts_of_the_folder_go_first(prompts, tmp_path):
    (tmp_path / longbench_prompts.NAME).write_text('{"trec": "{context}"}')
    assert longbench_prompts.prompt_of("longbench/trec", "trec", str(tmp_path)) == "{context}"
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"trec": "Lie."}', "is another file by now: its SHA-256 is "),
        (b" " * 2**17, "is another file by now: its SHA-256 is "),
        (None, r"cannot fetch file://.*dataset2prompt\.json: "),
    ],
    ids=["changed", "large", "gone"],
)
def test_prompts_that_are_not_there_are_asked_for(prompts, content, reason):
    prompts.unlink() if content is None else prompts.write_bytes(content)
    with pytest.raises(TextError, match=reason) as told:
        longbench_prompts.prompt_of("longbench/trec", "trec", "")
    said = str(told.value)
    assert said.startswith("longbench/trec: ") and "\n" not in said
    assert said.endswith(". Give the folder that holds dataset2prompt.json, data=DIR")


def test_a_cache_that_cannot_be_written_is_one_line(prompts, tmp_path):
    (tmp_path / "ours").write_text("")
    with pytest.raises(TextError, match=r"longbench/trec: cannot write .*ours"):
        longbench_prompts.prompt_of("longbench/trec", "trec", "")
