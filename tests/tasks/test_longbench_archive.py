"""LongBench's rows from a Hub on this machine: one member of an archive, at one commit."""

import hashlib
import io
import json
import zipfile

import pytest

from kvpolicy import TextError
from kvpolicy.tasks import longbench_archive
from kvpolicy.tasks.longbench import LongBenchTask
from kvpolicy.tasks.longbench_prompts import PROMPTS
from tests.fake_hub import fake_hub, use_hub
from tests.tiny_checkpoint import tiny_tokenizer

ROW = {"input": "Question: Who? Type:", "context": "Question: Why? Type: reason", "answers": ["person"]}
ROW |= {"all_classes": ["person", "reason"]}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def publish(monkeypatch, tmp_path):
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
    assert tokenizer.decode(sample.context + sample.questions[0]) == PROMPTS["trec"].format(**ROW)
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


def test_prompts_are_longbenchs_to_the_letter():
    """The digest is of these kinds in `config/dataset2prompt.json`."""
    digest = hashlib.sha256(json.dumps(PROMPTS, sort_keys=True).encode()).hexdigest()
    assert digest == "75e339f4f58566663b9e2916d85ca7258191b614158272128161675baece6c42"
    assert sorted(PROMPTS) == sorted(name for name in LongBenchTask.names if not name.endswith("_e"))
