"""A search that goes by the answers to a task's questions."""

import json
from dataclasses import replace

import pytest
import torch

from kvpolicy import (
    BudgetError,
    KVPolicyError,
    PluginError,
    PromptProbe,
    Sample,
    StudyError,
    TextError,
    Turn,
    read_corpus,
    registry,
)
from kvpolicy.comparison.answers import AnswerTask
from kvpolicy.integrations.transformers import attached, prompt_cache, with_cache
from kvpolicy.model.chat_frame import token_ids
from kvpolicy.tasks.family import task_of
from kvpolicy.tasks.known_answers import KnownAnswer, known_answer, split_samples
from kvpolicy.tasks.own_file import FileTask
from kvpolicy.tuning import TuneSettings, tune
from kvpolicy.tuning.probes import make_probes
from kvpolicy.tuning.study_notes import StudyNotes
from kvpolicy.tuning.task_probe import TaskProbe
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_checkpoint import text_of, tiny_tokenizer
from tests.tuning.searches import the_study

LENGTH = 300
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twenty questions about ten contexts of several lengths."""
    path = tmp_path_factory.mktemp("task") / "mine.jsonl"
    contexts = [text_of(40 + index % 3, seed=index) for index in range(10)]
    rows = [{"context": contexts[i // 2], "question": f"ku{i}?", "answers": [f"ba{i % 3}", "fi"]} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text_of(4000), encoding="utf-8")
    return read_corpus(TOKENIZER, path)


@pytest.fixture
def settings(tmp_path, questions):
    given = {"retentions": (0.4,), "trials": 1, "choose_dtype": False, "sequences": 2, "policy": "snapkv"}
    task = {"objective": "task:file", "data": questions, "context_length": LENGTH}
    return TuneSettings(**given, **task, storage=tmp_path / "plan.json.study")


def a_model():
    return tiny_model("Llama", layers=2, vocab_size=len(TOKENIZER))


def answers(shapes):
    """Known answers of these shapes, of tokens that differ."""
    made = []
    for number, (prompt, question, answer) in enumerate(shapes):
        ids = tiny_ids(prompt + question + answer + number)[0, number:].tolist()
        parts = ids[:prompt], ids[prompt : prompt + question], ids[prompt + question :]
        made.append(KnownAnswer(*map(tuple, parts)))
    return made


# --- answers


def turn_sample(question="Where is it?", prefix="", answers=("there",), chat=True):
    return Sample.from_text(TOKENIZER, "ba de", [Turn(question, answers, prefix)], chat=chat)


@pytest.mark.parametrize(
    ("question", "prefix", "text"),
    [("ku?", "", " there"), ("ku?\n", "", "there"), ("ku?", " It is", " there"), ("ku?", " It is ", "there")],
)
def test_an_answer_begins_as_the_words_before_it_let_it(question, prefix, text):
    found = known_answer(FileTask(), TOKENIZER, turn_sample(question, prefix), "aware")
    assert found.answer == tuple(token_ids(TOKENIZER, text)) and found.question == ()
    agnostic = known_answer(FileTask(), TOKENIZER, turn_sample(question, prefix), "agnostic")
    assert agnostic.prompt + agnostic.question == found.prompt and agnostic.answer == found.answer


def test_nothing_stands_between_a_chat_template_and_the_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{m['role']}}>{{m['content']}}<end>{% endfor %}<assistant>"
    sample = Sample.from_text(tokenizer, "ba de", [Turn("ku?", ("there",))])
    found = known_answer(FileTask(), tokenizer, sample, "aware")
    assert tokenizer.decode(found.answer) == "there"
    assert tokenizer.decode(found.prompt).endswith("<end><assistant>")


def test_all_answers_are_one_where_the_score_asks_for_all():
    every = turn_sample(answers=("fi", "ku"))
    assert TOKENIZER.decode(known_answer(task_of("ruler/vt"), TOKENIZER, every, "aware").answer) == " fi, ku"
    assert TOKENIZER.decode(known_answer(FileTask(), TOKENIZER, every, "aware").answer) == " fi"
    short = known_answer(FileTask(max_new_tokens=1), TOKENIZER, every, "aware")
    assert len(short.answer) == 1
    with pytest.raises(TextError, match="an answer without tokens"):
        known_answer(FileTask(), TOKENIZER, turn_sample("ku?\n", answers=("",)), "aware")


def test_samples_of_one_context_are_on_one_side():
    samples = [Sample((context,), ((context, number),), ()) for context in range(8) for number in range(3)]
    mine, others = split_samples(samples, 9, 100, seed=1)
    assert len(mine) == 9 and len(others) == 15
    assert not {sample.context for sample in mine} & {sample.context for sample in others}
    assert split_samples(samples, 9, 100, seed=1) == (mine, others) != split_samples(samples, 9, 100, seed=2)
    assert [len(part) for part in split_samples(samples[::3], 16, 32, seed=0)] == [4, 4], "half of few"
    for few in (samples[:21:3], samples[:3] * 4):
        with pytest.raises(TextError, match="a search takes 8 at least"):
            split_samples(few, 16, 32, seed=0)


# --- the probe


@pytest.mark.parametrize("question", [0, 5])
@pytest.mark.parametrize("policy", ["snapkv", "streaming"])
def test_a_loss_is_that_of_the_answer_token_by_token(policy, question):
    model, rule = a_model(), registry.create("policy", policy)
    known = answers([(40, question, 3), (30, question, 1)])
    probe, table = TaskProbe(model, known, policy=rule), torch.tensor([[20, 12], [16, 24]])
    found = probe.loss(table)
    for index, (own, scale) in enumerate([(table, 1), (table * 3 // 4, 0.75)]):
        one = known[index]
        with torch.no_grad(), attached(model):
            cache = prompt_cache(model, rule, own)
            logits = model(torch.tensor([one.prompt]), **with_cache(model, cache)).logits[:, -1:]
            losses = []
            for place, token in enumerate(one.question + one.answer):
                if place >= len(one.question):
                    losses.append(-float(logits[0, -1].double().log_softmax(-1)[token]))
                logits = model(torch.tensor([[token]]), **with_cache(model, cache)).logits
        assert float(found[index]) == pytest.approx(sum(losses) / len(losses), rel=1e-5), scale


def test_samples_of_one_shape_are_a_batch_and_lengths_get_equal_shares():
    model, rule, known = a_model(), registry.create("policy", "snapkv"), answers([(40, 4, 3), (20, 4, 3), (40, 4, 3)])
    alone, both = (TaskProbe(model, known, policy=rule, batch_size=size) for size in (1, 2))
    table = torch.tensor([[20, 12], [16, 24]])
    torch.testing.assert_close(alone.loss(table), both.loss(table), rtol=1e-5, atol=1e-6)
    assert [losses.shape for losses in both.token_losses(table)] == [(2, 3), (1, 3)]
    assert alone.context_length == 40 and alone.num_sequences == 3
    short = TaskProbe(model, known[1:2], policy=rule).loss(table // 2)
    torch.testing.assert_close(alone.loss(table)[2:], short)
    full = torch.full((2, 2), 40)
    whole = PromptProbe(model, torch.tensor([known[1].ids]), policy=rule, prefill_length=20, unscored=4).full_loss()
    torch.testing.assert_close(alone.loss(full)[2:], whole)


def test_the_bias_of_a_shorter_prompt_keeps_the_same_part_of_it():
    """A hard edge at half of the longest prompt is the loss with half of each prompt kept."""
    model, rule, known = a_model(), registry.create("policy", "snapkv"), answers([(40, 3, 4), (20, 3, 4)])
    probe, sinks = TaskProbe(model, known, policy=rule), rule.num_sink_tokens

    def edge(layer, rank):
        return torch.where(rank < 20 - sinks, 0.0, -1e9)

    soft = torch.cat([probe.soft_loss(edge, "text", sequence=index) for index in range(2)])
    torch.testing.assert_close(soft.double(), probe.soft_loss(edge, "text").double())
    torch.testing.assert_close(soft.double(), probe.loss(torch.full((2, 2), 20)), rtol=1e-4, atol=1e-5)


# --- the search


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_the_figures_of_a_plan_are_those_of_answers_it_was_not_searched_on(settings, corpus, question):
    settings = replace(settings, question=question)
    model = a_model()
    plan = tune(model, corpus, settings)
    facts = plan.provenance["task"]
    assert plan.provenance["objective"] == "task:file" and "needles" not in plan.provenance
    assert (facts["name"], facts["question"], facts["data"]) == ("file", question, "mine.jsonl")
    assert (facts["search"], facts["heldout"]) == (8, 12)
    search, heldout, _ = make_probes(model, corpus, settings, registry.create("policy", "snapkv"))
    assert not {x.prompt for x in search.answers.answers} & {x.prompt for x in heldout.answers.answers}
    assert facts["samples_sha256"] == search.answers.digest
    table = plan.capacities(heldout.answers.context_length, retention=0.4)
    loss = float(heldout.answers.loss(table).mean())
    level = plan.levels[0]
    assert level.retrieval["answer_loss"]["heldout"] == pytest.approx(loss, rel=1e-6)
    assert level.comparison["n"] == 12 == level.comparison["loss_over_full"]["n"]


def test_what_is_searched_is_what_eval_compresses(settings, corpus):
    for question in ("aware", "agnostic"):
        made = replace(settings, question=question)
        search, *_ = make_probes(a_model(), corpus, made, registry.create("policy", "snapkv"))
        samples = made.task.samples(TOKENIZER, 20, LENGTH, 0)
        task = AnswerTask("file", made.task, a_model(), TOKENIZER, samples, question=question)
        prompts = {tuple(prompt[0].tolist()) for prompt in task.prompts}
        assert {answer.prompt for answer in search.answers.answers} <= prompts


def test_eval_asks_for_nothing_that_a_search_has_learned(settings, corpus):
    """Not even for as many prompts as the search had made."""
    learning = replace(settings, objective="task:key-value", data=None, context_length=400)
    search, heldout, learned = make_probes(a_model(), corpus, learning, registry.create("policy", "snapkv"))
    count = len(search.answers.answers) + len(heldout.answers.answers)
    samples = registry.create("task", "key-value").samples(TOKENIZER, count, 400, learning.seed)
    assert learned
    assert not learned & {answer for sample in samples for turn in sample.turns for answer in turn.answers}


def test_learned_budgets_learn_from_answers(settings, corpus):
    learned = replace(settings, allocator="learned", allocator_params={"steps": 2}, estimator="uniform")
    tune(a_model(), corpus, learned)
    shares = StudyNotes(the_study(learned)).fitted_shares
    assert float(shares.max() - shares.min()) > 0


def test_resume_with_another_question_or_task_is_refused_by_name(settings, corpus):
    once = replace(settings, trials=1, sequences=1)
    tune(a_model(), corpus, once)
    for change, named in [
        ({"question": "agnostic"}, "task was"),
        ({"objective": "task:passkey", "data": None}, 'objective was "task:file"'),
    ]:
        with pytest.raises(StudyError, match=named):
            tune(a_model(), corpus, replace(once, resume=True, **change))


def test_objectives_that_are_none_are_refused(settings, corpus):
    with pytest.raises(BudgetError, match=r"data= and question= go with objective=task:NAME, not with mixed"):
        replace(settings, objective="mixed")
    for objective, message in [("task:ruler", "is a family of tasks"), ("task:nothing", "nothing")]:
        with pytest.raises(PluginError, match=message):
            replace(settings, objective=objective)
    with pytest.raises(KVPolicyError, match="must be aware or agnostic"):
        replace(settings, question="late")
    with pytest.raises(TextError, match=r"the objective task:file makes prompts of its own, .* read_corpus"):
        tune(a_model(), replace(corpus, tokenizer=None), settings)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task-file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--objective", "task:ruler/xx"], "there is no task 'ruler/xx'"),
        (["--question", "agnostic"], "--question go with --objective task:NAME"),
    ],
)
def test_tune_refuses_before_a_model_is_loaded(refused, arguments, expected):
    assert expected in refused("tune", *arguments)


def test_tune_takes_a_file_of_questions(kvpolicy, tiny_checkpoint, questions, tmp_path):
    out = tmp_path / "plan.json"
    model = ["--model", tiny_checkpoint, "--dtype", "float32", "--context", LENGTH, "--trials", 1, "--retention", 0.4]
    task = ["--task-file", questions, "--question", "agnostic", "--policy", "snapkv", "--sequences", 1]
    result = kvpolicy("tune", *model, *task, "--out", out)
    assert result.code == 0, result.err
    assert "4 question-agnostic prompts of task:file of" in result.err
    assert json.loads(out.read_text())["provenance"]["task"]["heldout"] == 16
    other = kvpolicy("tune", *model, *task, "--objective", "mixed", "--out", out)
    assert other.code == 2 and "--task-file is an objective of its own" in other.err
