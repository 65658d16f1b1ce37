"""Samples that are run together give what each gives alone: other lengths, other turns, answers that end early."""

import json

import pytest
import torch

from kvpolicy import registry
from kvpolicy.cache.schedule import ByLength
from kvpolicy.comparison.answers import AnswerTask
from kvpolicy.comparison.methods import Method, read_methods
from kvpolicy.errors import BudgetError
from kvpolicy.plugins.task_role import Sample, Turn
from kvpolicy.progress import Progress
from kvpolicy.tasks.own_file import FileTask
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_checkpoint import tiny_tokenizer

MOST = 6


class Speller:
    """Tokens as numbers."""

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def sample(length, questions):
    """questions: tokens of each turn"""
    ids, asked = tiny_ids(length + sum(questions) + len(questions))[0, len(questions) :].tolist(), []
    for count in questions:
        asked.append(tuple(ids[length : length + count]))
        length += count
    return Sample(tuple(ids[: len(ids) - sum(questions)]), tuple(asked), tuple(Turn("?", ("3",)) for _ in asked))


SAMPLES = [sample(40, (8,)), sample(52, (3, 9, 2)), sample(31, (5, 5)), sample(52, (3,)), sample(47, (1, 4, 6))]


def task_of(samples, model, tokenizer=None, **options):
    return AnswerTask("file", FileTask(max_new_tokens=MOST), model, tokenizer or Speller(), samples, **options)


def method(policy, allocator="uniform"):
    chosen = registry.create("allocator", allocator)
    return Method(f"{policy}/{allocator}", policy, registry.create("policy", policy), allocator, chosen)


def third(context):
    """A third of a prompt, which differs from head to head."""
    return torch.tensor([[context // 3, context // 4], [context // 2, context // 3], [context // 4, context // 3]])


def records_of(task, chosen, tables=third):
    task.measure(chosen, tables)
    return [task.records.find(chosen, tables(ids.shape[1]), row) for row, ids in enumerate(task.prompts)]


def a_model(ends):
    """A model whose answers end at different times: every second token is an end."""
    model = tiny_model("Llama")
    model.generation_config.eos_token_id = list(range(0, 97, 2)) if ends else 2
    return model


@pytest.mark.parametrize(("question", "ends"), [("aware", True), ("agnostic", False)])
@pytest.mark.parametrize("policy", ["snapkv", "streaming", "h2o"])
def test_a_batch_answers_as_its_samples_do_alone(policy, question, ends):
    model = a_model(ends)
    alone, together = (task_of(SAMPLES, model, question=question, batch_size=size) for size in (1, 3))
    expected, records = records_of(alone, method(policy)), records_of(together, method(policy))
    assert [record["answers"] for record in records] == [record["answers"] for record in expected]
    assert [record["entries"] for record in records] == [record["entries"] for record in expected]
    if ends:
        assert len({len(answer.split()) for record in records for answer in record["answers"]}) > 1


@pytest.mark.parametrize("policy", ["kvzip", "kv_compress"])
def test_policies_that_repeat_or_look_at_capacity_answer_in_a_batch(policy):
    tokenizer = tiny_tokenizer()
    model = tiny_model("Llama", vocab_size=len(tokenizer))
    found = [records_of(task_of(SAMPLES, model, tokenizer, batch_size=size), method(policy)) for size in (1, 5)]
    assert [record["answers"] for record in found[0]] == [record["answers"] for record in found[1]]


@pytest.mark.parametrize(
    ("policy", "allocator"), [("snapkv", "adakv"), ("kv_compress", "kv_compress"), ("snapkv", "cake")]
)
def test_a_budget_that_is_split_at_run_time_is_split_for_each_row(policy, allocator):
    model = a_model(ends=True)
    found = [records_of(task_of(SAMPLES, model, batch_size=size), method(policy, allocator)) for size in (1, 3)]
    assert [record["answers"] for record in found[0]] == [record["answers"] for record in found[1]]


def whole(context):
    return torch.full((3, 2), context)


def test_the_full_cache_answers_in_a_batch():
    model, chosen = a_model(ends=True), read_methods(["full"])[0]
    found = [records_of(task_of(SAMPLES, model, batch_size=size), chosen, whole) for size in (1, 4)]
    assert [record["answers"] for record in found[0]] == [record["answers"] for record in found[1]]


def test_a_batch_of_which_some_is_known_is_run_again_and_written_once(tmp_path):
    model, path = a_model(ends=False), tmp_path / "r.jsonl"
    first = task_of(SAMPLES, model, batch_size=3, records=path).measure(method("snapkv"), third)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n")  # the second batch has one of two
    again = task_of(SAMPLES, model, batch_size=3, records=path)
    second = again.measure(method("snapkv"), third)
    assert torch.equal(first.losses, second.losses)
    assert sorted(map(untimed, path.read_text().splitlines())) == sorted(map(untimed, lines))


def untimed(line):
    """A record without its time, which is another one in each run."""
    record = json.loads(line)
    assert record.pop("seconds") > 0
    return json.dumps(record)


def test_progress_is_told_of_each_sample_but_the_last():
    class Counted(Progress):
        steps = 0

        def advance(self, detail=""):
            self.steps += 1

    counted = Counted()
    task = task_of(SAMPLES, a_model(ends=True), batch_size=2, progress=counted)
    task.measure(method("snapkv"), third)
    assert (counted.steps, task.steps) == (4, 5)


def test_capacities_by_length_are_those_of_the_prompt_from_then_on():
    tables = {4: torch.full((3, 2), 3), 6: torch.full((3, 2), 5)}
    schedule = ByLength(tables)
    assert schedule.shape == (3, 2) and schedule.evicts
    assert torch.equal(schedule.at(6, None), tables[6]) and torch.equal(schedule.at(9, tables[4]), tables[4])
    assert (schedule.total(5), schedule.total(60)) == (18, 30)
    with pytest.raises(BudgetError, match="the budget gives 3 entries"):
        schedule.with_floor(4)
    with pytest.raises(BudgetError, match="capacities must be whole numbers"):
        ByLength({4: torch.rand(3, 2)})
