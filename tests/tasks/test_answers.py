"""Registered tasks over real caches: full is dense, the question's time, turns, records, and the two verbs."""

import json

import pytest
import torch
from transformers import AutoConfig

import kvpolicy
from kvpolicy import BudgetPlan, KVPolicyError, ModelSpec, Sample, Turn, registry, save_plan
from kvpolicy.budget.plan import PlanChoice
from kvpolicy.comparison.answers import AnswerTask
from kvpolicy.comparison.methods import Method, read_methods
from kvpolicy.comparison.real_cache import filled_cache, ready
from kvpolicy.comparison.results_file import load_comparison
from kvpolicy.integrations.transformers import RaggedCache
from kvpolicy.progress import Progress
from kvpolicy.tasks.own_file import FileTask
from kvpolicy.tasks.question_time import check_question
from kvpolicy.verbs.chosen_task import chosen_task
from kvpolicy.verbs.eval_task import answer_rows
from tests.integrations.recording import record_on_cpu
from tests.tiny import over, tiny_ids, tiny_model

SHAPE, MOST = (3, 2), 5


class Speller:
    """Tokens as numbers."""

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def sample(length=40, turns=1, seed=0):
    ids = tiny_ids(length + 8 * turns + seed)[0].tolist()
    questions = tuple(tuple(ids[length + 8 * turn : length + 8 * turn + 8]) for turn in range(turns))
    asked = tuple(Turn(f"question {turn}", ("3",)) for turn in range(turns))
    return Sample(tuple(ids[:length]), questions, asked, {"seed": seed})


def task_of(samples, model=None, **options):
    role = FileTask(max_new_tokens=MOST)
    return AnswerTask("file", role, model or tiny_model("Llama"), Speller(), samples, **options)


def method(policy="snapkv"):
    return Method("x", policy, registry.create("policy", policy), "uniform", registry.create("allocator", "uniform"))


def whole(context):
    return torch.full(SHAPE, context)


def answers_of(task, chosen, tables):
    task.measure(chosen, tables)
    return [task.records.find(chosen, tables(p.shape[1]), i)["answers"] for i, p in enumerate(task.prompts)]


def dense_answers(model, one):
    """A plain conversation over transformers' own cache."""
    kvpolicy.detach(model)
    said, ids = [], list(one.context)
    for question in one.questions:
        ids += question
        options = {"max_new_tokens": MOST, "do_sample": False}
        out = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        said.append(" ".join(map(str, out)))
        ids += out[:-1] if out[-1] == 2 else out
    return said


@pytest.mark.parametrize("question", ["aware", "agnostic"])
@pytest.mark.parametrize("policy", ["snapkv", "streaming"])
def test_whole_capacities_give_the_answers_of_a_plain_conversation(question, policy):
    model, samples = tiny_model("Llama"), [sample(turns=3), sample(33, turns=2, seed=1)]
    expected = [dense_answers(model, one) for one in samples]
    task = task_of(samples, model, question=question)
    assert answers_of(task, method(policy), whole) == expected
    assert answers_of(task, read_methods(["full"])[0], whole) == expected


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_what_is_compressed_is_the_prompt_and_nothing_behind_it(question):
    one = sample(turns=2)
    task = task_of([one], question=question)
    measured = task.measure(method(), lambda context: torch.full(SHAPE, context // 4))
    compressed = 40 if question == "agnostic" else 48
    assert task.context == compressed
    assert measured.memory.entries == 6 * (compressed // 4)
    assert measured.memory.dense_bytes == 3 * 2 * compressed * (16 + 16) * 4


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_what_follows_a_compressed_prompt_is_fed_as_if_token_by_token(question):
    model, one = tiny_model("Llama"), sample()
    task, table = task_of([one], model, question=question), torch.full(SHAPE, 12)
    (found,) = answers_of(task, method(), lambda _: table)
    with ready(model, method()):
        cache, logits = filled_cache(model, method(), table, task.prompts[0])
        fed, said = list(one.questions[0]) if question == "agnostic" else [], []
        while len(said) < MOST and 2 not in said:
            for token in fed:
                logits = model(torch.tensor([[token]]), **over(cache)).logits
            said.append(int(logits[0, -1].argmax()))
            fed = said[-1:]
    assert found == [" ".join(map(str, said))]


@pytest.mark.parametrize(
    ("question", "turns", "expected"), [("aware", 1, False), ("aware", 2, True), ("agnostic", 1, True)]
)
def test_tokens_are_held_back_only_where_a_question_follows(question, turns, expected, monkeypatch):
    asked, hold = [], RaggedCache.hold
    monkeypatch.setattr(RaggedCache, "hold", lambda cache, count: asked.append(count) or hold(cache, count))
    task_of([sample(turns=turns)], question=question).measure(method(), whole)
    assert bool(asked) == expected, "tokens that are held back are no replays of a graph"


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_answers_of_a_batch_are_replays(question, monkeypatch):
    """Prompts of two lengths, padded; the same answers as without a graph."""
    model, samples = tiny_model("Llama"), [sample(), sample(33, seed=1)]
    expected, found = [], []
    for answers in (expected, found):
        task = task_of(samples, model, question=question, batch_size=2)
        recorded = record_on_cpu(monkeypatch) if answers is found else []
        answers += answers_of(task, method(), lambda length: whole(20))
    assert found == expected and sum(recording.replays for recording in recorded) >= 2


def test_the_two_times_of_a_question_differ_once_something_is_evicted():
    model, samples = tiny_model("Llama"), [sample(60, seed=seed) for seed in range(4)]
    tables = lambda context: torch.full(SHAPE, context // 6)  # noqa: E731
    found = [answers_of(task_of(samples, model, question=word), method(), tables) for word in ("aware", "agnostic")]
    assert found[0] != found[1]
    settings = [task_of(samples, model, question=word).settings for word in ("aware", "agnostic")]
    assert settings[0]["protocol"] == "question-aware" != settings[1]["protocol"]


def test_a_run_time_allocator_and_a_policy_that_repeats_answer_too():
    samples = [sample(), sample(36, seed=1)]
    split = Method("s", "snapkv", registry.create("policy", "snapkv"), "adakv", registry.create("allocator", "adakv"))
    assert len(task_of(samples).measure(split, lambda context: torch.full(SHAPE, 12)).losses) == 2


def test_records_are_gone_on_with(tmp_path, monkeypatch):
    path, samples, tables = tmp_path / "r.jsonl", [sample(), sample(seed=1)], lambda _: torch.full(SHAPE, 12)
    first = task_of(samples, records=path, facts={"seed": 5}).measure(method(), tables)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [0, 1]
    assert {"answers", "scores", "bytes", "about", "method", "tokens", "seconds"} <= json.loads(lines[0]).keys()
    assert {"task": "file", "question": "aware", "n": 2, "seed": 5}.items() <= json.loads(lines[0]).items()
    path.write_text(lines[0] + "\n" + lines[1][:30])  # a run that was cut short
    again, run = task_of(samples, records=path), []
    answered = again._answers
    monkeypatch.setattr(again, "_answers", lambda *given: run.append(1) or answered(*given))
    second = again.measure(method(), tables)
    assert run == [1]
    assert torch.equal(first.losses, second.losses) and first.memory == second.memory
    for other in (
        task_of(samples, records=path, question="agnostic"),
        task_of(samples, records=path, settings={"weights": "others"}),
    ):
        assert other.records.find(method(), tables(0), 0) is None
    assert again.records.find(method("streaming"), tables(0), 0) is None
    assert again.records.find(method(), torch.full(SHAPE, 13), 0) is None


def test_records_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(KVPolicyError, match="cannot read"):
        task_of([sample()], records=tmp_path)


def test_a_word_for_the_time_is_one_of_two():
    assert check_question("agnostic") == "agnostic"
    with pytest.raises(KVPolicyError, match="question= must be aware or agnostic, got 'late'"):
        check_question("late")


# --- the verbs


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "mine.jsonl"
    rows = [{"context": "ba de fi " * 12 + f"go{i}", "question": "ku?", "answers": ["ba"]} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def small(questions, tiny_checkpoint):
    return ["--model", tiny_checkpoint, "--task-file", questions, "--context", 120, "--limit", 3, "--dtype", "float32"]


def test_eval_gives_a_row_of_each_with_its_metric(kvpolicy, small, tmp_path):
    options = [*small, "--policy", "snapkv", "--question", "agnostic", "--records", tmp_path / "r.jsonl"]
    result = kvpolicy("eval", "uniform", *options, "--retention", 0.5, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert (document["task"], document["question"], document["metric"]) == ("file", "agnostic", "f1")
    assert document["f1"] == document["score"] and document["n"] == 3 and document["retention"] == 0.5
    assert document["bytes"] < document["full"]["bytes"] and document["versions"]["kvpolicy"]
    assert document["seconds"] > 0 and document["full"]["seconds"] > 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 6
    table = kvpolicy("eval", "full", *options)
    assert "f1" in table.out and "a context before its question" in table.out


def test_eval_runs_a_plan(kvpolicy, small, tiny_checkpoint, tmp_path):
    spec = ModelSpec.from_config(AutoConfig.from_pretrained(tiny_checkpoint))
    plan = tmp_path / "plan.json"
    save_plan(BudgetPlan.from_capacities(spec, torch.tensor([[40, 20], [60, 80]]), 100), plan)
    result = kvpolicy("eval", plan, *small, "--retention", 0.5, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["plan"] == str(plan) and document["uniform"]["entries"] == document["entries"]


def test_compare_writes_rows_and_samples_and_goes_on(kvpolicy, small, tmp_path):
    out = tmp_path / "rows.json"
    command = ["compare", "snapkv", *small, "--retention", 0.5, "--out", out, "--no-timing", "--question", "agnostic"]
    assert kvpolicy(*command).code == 0
    found = load_comparison(out)
    assert found.settings["metric"] == "f1" and found.settings["protocol"] == "question-agnostic"
    assert {row.method for row in found.rows.values()} == {"full", "random/uniform", "snapkv/uniform"}
    samples = (tmp_path / "rows.samples.jsonl").read_text().splitlines()
    assert len(samples) == 9
    first = json.loads(samples[0])
    assert (first["task"], first["question"], first["n"], first["seed"]) == ("file", "agnostic", 3, 0)
    assert first["versions"].keys() == {"kvpolicy", "torch", "transformers"}
    assert "| f1 |" in out.with_suffix(".md").read_text()
    assert "0 rows of 3 sequences to measure" in kvpolicy(*command).err
    other = kvpolicy(*command[:-1], "aware")
    assert other.code == 2 and "other settings" in other.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "ruler/xx"], "there is no task 'ruler/xx'"),
        (["--task", "ruler"], "'ruler' is a family of tasks"),
        (["--task", "nonsense"], "no task named 'nonsense'; there is: perplexity, key-value"),
        (["--task", "passkey", "--question", "late"], "--question must be aware or agnostic, got 'late'"),
        (["--question", "agnostic"], "go with a task whose prompts have questions, not with perplexity"),
        (["--task", "passkey", "--data", "."], "the task passkey reads no files"),
        (["--task", "ruler/vt", "--prefill", 5], "--prefill goes with perplexity"),
        (["--task", "ruler/vt", "--task-file", "x"], "--task-file is a task of its own"),
        (["--task-file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_arguments_that_do_not_go_together_are_refused_before_a_model_is_loaded(refused, verb, arguments, expected):
    what = ["uniform", "--retention", 0.5] if verb == "eval" else ["snapkv"]
    assert expected in refused(verb, *what, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--task", "passkey", "--text", "x"], "--text goes with perplexity"), (["--records", "x"], "--records")],
)
def test_eval_refuses_what_is_of_the_other_kind(refused, arguments, expected):
    assert expected in refused("eval", "full", *arguments)


def test_a_task_of_one_sample_cannot_be_compared(refused, small, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"context": "ba", "question": "ku?", "answers": ["ba"]}))
    command = ["compare", "snapkv", *small[:2], "--task-file", path, "--context", 120, "--out", tmp_path / "x.json"]
    assert "file has 1 sample here: 2 are needed to compare" in refused(*command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("ruler/niah_single_1", "aware"),
        ("ruler/niah_single_1", "agnostic"),
        ("key-value", "agnostic"),
        ("scbench/vt", "agnostic"),
    ],
)
def test_smollm2_answers_under_full_uniform_and_a_plan(smollm2, name, question):
    model, tokenizer = smollm2
    task = chosen_task(name, question=question).of_model(model, tokenizer, limit=2, context=800, seed=0)
    shares = torch.arange(60, 150).reshape(30, 3)
    plan = BudgetPlan.from_capacities(task.spec, shares, 800, PlanChoice("snapkv"))
    snapkv = registry.create("policy", "snapkv")
    options = {"seed": 0, "facts": {}, "progress": Progress()}
    pairs = [("full", 1.0, None), ("uniform", 0.5, None), ("plan.json", 0.5, None)]
    rows = answer_rows(task, plan, ("snapkv", snapkv), pairs, **options)
    assert [row["plan"] for row in rows] == ["full", "uniform", "plan.json"]
    assert all(0 <= row["score"] <= 1 for row in rows)
    assert rows[1]["bytes"] < 0.6 * rows[0]["bytes"] and rows[1]["entries"] == rows[2]["entries"]
    if name == "ruler/niah_single_1":
        assert rows[0]["score"] == 1, "this model finds a needle in 800 tokens"
