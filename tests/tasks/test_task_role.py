"""The role: registering a task, families, what the kit and the core refuse."""

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from kvpolicy import PluginError, Sample, Task, Turn, hookimpl, registry
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import Registry
from kvpolicy.tasks.family import task_names, task_of
from kvpolicy.testing import LawError, check_task
from tests.tiny_checkpoint import tiny_tokenizer


@dataclass(frozen=True, slots=True)
class CountingTask(Task):
    """How many words a text has."""

    word: str = "ba"
    max_new_tokens: int = 4

    @property
    def metric(self):
        return "accuracy"

    def samples(self, tokenizer, count, length, seed):
        texts = [self.word * (seed + index + 1) for index in range(count)]
        return [Sample.from_text(tokenizer, text, [Turn(" How many?", (str(len(text)),))]) for text in texts]

    def score(self, answer, turn):
        return float(answer.strip() == turn.answers[0])


def with_plugin(target):
    module = ModuleType("a_plugin")

    @hookimpl
    def kvpolicy_register(register):
        register.task("counting", target, summary="Counts.")

    module.kvpolicy_register = kvpolicy_register
    owner = SimpleNamespace(name="acme", version="1.2")
    return Registry(lambda: [SimpleNamespace(name="main", load=lambda: module, dist=owner)])


def test_a_third_party_registers_a_task():
    own = with_plugin(CountingTask)
    assert own.create("task", "counting", {"word": "do"}) == CountingTask("do")
    assert own.names("task") == ["counting"]
    assert own.whose(CountingTask()) == "task 'counting' of acme 1.2"


def test_what_is_no_task_is_refused():
    @dataclass(frozen=True, slots=True)
    class Lengthless(CountingTask):
        max_new_tokens: int = 0

    with pytest.raises(PluginError, match="`max_new_tokens` is 0, expected an int >= 1"):
        with_plugin(Lengthless).get("task", "counting")
    with pytest.raises(PluginError, match=r"no subclass of kvpolicy\.Task"):
        with_plugin(str).get("task", "counting")


def test_every_built_in_task_is_registered_with_its_members():
    assert {"passkey", "key-value", "needle-grid", "ruler/vt", "longbench/trec_e", "scbench/kv"} <= set(task_names())
    assert all(task_of(name).max_new_tokens for name in task_names())
    rows = [row for row in registry.rows() if row.role == "task"]
    assert {row.status for row in rows} == {"ok"}
    assert all(row.summary and row.when for row in rows)


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("rular/vt", {}, "no task named 'rular' (did you mean 'ruler'?)"),
        ("ruler/vtt", {}, "no task 'ruler/vtt' (did you mean 'vt'?)"),
        ("ruler", {}, "'ruler' is a family of tasks: name one of them, such as ruler/cwe"),
        ("passkey/x", {}, "'passkey' is one task, not a family: leave '/x' out"),
        ("passkey", {"data": "x"}, "the task passkey reads no files"),
    ],
)
def test_a_name_that_is_none_says_what_to_do(name, params, expected):
    with pytest.raises(PluginError) as error:
        task_of(name, params)
    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["passkey", "key-value", "needle-grid", "ruler/vt", "scbench/prefix_suffix"])
def test_built_in_tasks_hold_the_laws(name):
    check_task(task_of(name))


@dataclass(frozen=True, slots=True)
class Broken(CountingTask):
    """A task with one fault."""

    fault: str = ""
    calls: list = field(default_factory=list)

    def samples(self, tokenizer, count, length, seed):
        self.calls.append(seed)
        made = CountingTask.samples(self, tokenizer, count, length, seed)
        return {
            "none": [],
            "more": [*made, *made],
            "moody": made[: len(self.calls)],
            "long": [Sample(made[0].context * length, made[0].questions, made[0].turns)],
            "silent": [Sample(made[0].context, ((),), made[0].turns)],
            "words": ["text"],
        }.get(self.fault, made)

    def score(self, answer, turn):
        right = CountingTask.score(self, answer, turn)
        return {"percent": 100 * right, "never": 0.0}.get(self.fault, right)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("none", "samples gives 1 to 3"),
        ("more", "samples gives 1 to 3"),
        ("moody", "the same for the same seed"),
        ("long", "at most 4096 tokens"),
        ("silent", "none of them empty"),
        ("percent", "a score is from 0 to 1"),
        ("never", "a right answer scores 1"),
    ],
)
def test_the_kit_finds_each_fault(fault, law):
    with pytest.raises(LawError, match=law):
        check_task(Broken(fault=fault))
    check_task(Broken(), tiny_tokenizer())


@pytest.mark.parametrize("fault", ["none", "more", "long", "silent", "words"])
def test_the_core_refuses_samples_that_cannot_be(fault):
    with pytest.raises(PluginError, match=r"Broken\.samples returned .*, expected 1 to 3 samples of at most 500"):
        plugin_call.task_samples(Broken(fault=fault), tiny_tokenizer(), 3, 500, 0)


def test_the_core_refuses_scores_that_cannot_be():
    task = Broken(fault="percent")
    with pytest.raises(PluginError, match=r"Broken\.score returned 100.0, expected a number from 0 to 1"):
        plugin_call.answer_score(task, "2", Turn("?", ("2",)))
    assert plugin_call.answer_score(task, "3", Turn("?", ("2",))) == 0
