"""What a search goes by: answers behind prompts, both halves of `mixed`, a limit on the loss. And what it ran."""

import re
from dataclasses import dataclass, replace

import optuna
import pytest
import scipy.stats
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvpolicy import (
    Budget,
    BudgetAllocator,
    BudgetError,
    PluginError,
    PromptProbe,
    StudyError,
    TextError,
    TransformersProbe,
    apportion,
    read_corpus,
)
from kvpolicy.budget.plan import kept_fractions
from kvpolicy.comparison.methods import Method
from kvpolicy.comparison.task import RetrievalTask
from kvpolicy.measure.stats import relative_increase
from kvpolicy.plugins.registry import registry
from kvpolicy.progress import Progress
from kvpolicy.tasks.needles import equal_answers, make_needles
from kvpolicy.tasks.questions import make_passkeys
from kvpolicy.tuning import TuneSettings, search, tune
from kvpolicy.tuning.joined import JoinedProbe
from kvpolicy.tuning.passkey import PasskeyCheck
from kvpolicy.tuning.storage import open_storage
from kvpolicy.tuning.study_notes import StudyNotes
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_checkpoint import text_of, tiny_tokenizer
from tests.tuning.searches import make_corpus, make_settings, run, the_study

FIRST_SEED = 10**9  # of a search, whose prompts nobody else is to make
LENGTH = 300  # the shortest round number that both kinds of needle prompts fit into


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text_of(4000), encoding="utf-8")
    return read_corpus(tiny_tokenizer(), path)


@pytest.fixture
def settings(tmp_path):
    given = {"retentions": (0.4,), "context_length": LENGTH, "trials": 2, "choose_dtype": False, "sequences": 2}
    return TuneSettings(**given, objective="retrieval", storage=tmp_path / "plan.json.study")


def a_model():
    return tiny_model("Llama", layers=2, vocab_size=len(tiny_tokenizer()))


def pairs_tokenizer():
    """Half of the pairs of digits are one token, so that numbers have 3 to 6 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "0123456789" for b in "0123456789" if (int(a) + int(b)) % 2]
    pieces = ["<s>", *alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


# --- needle prompts


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), pairs_tokenizer()], ids=["digits", "pairs"])
def test_needles_are_prompts_of_one_length_with_answers_of_one_length(tokenizer):
    made = make_needles(tokenizer, 8, 600, seed=1)
    behind = made.sequences.shape[1] - 600
    for index, row in enumerate(made.sequences):
        prompt, answer = tokenizer.decode(row[:600]), tokenizer.decode(row[600:])
        kind = r" The pass key is (\d{5})\. Remember" if index % 2 == 0 else r" Item \d+ has number (\d{5})\."
        assert re.fullmatch(r" \d{5}", answer) and answer.strip() in re.findall(kind, prompt)
        assert answer.strip() in made.answers and len(row) == 600 + behind
    assert len(made.answers) == 8
    assert torch.equal(make_needles(tokenizer, 8, 600, seed=1).sequences, made.sequences)
    others = make_needles(tokenizer, 8, 600, seed=1, without=made.answers)
    assert not others.answers & made.answers, "the same seed would ask for the same numbers"


def test_needles_that_cannot_be_made_say_why():
    with pytest.raises(TextError, match=r"a prompt of 150 tokens is too short for this task: give at least"):
        make_needles(tiny_tokenizer(), 4, 150, seed=0)

    class Whole:
        bos_token_id = None
        name_or_path = "whole"

        def __call__(self, text, **_):
            return type("Ids", (), {"input_ids": [sum(text.encode())]})

    with pytest.raises(TextError, match=r"joins the number \d+ to the end of its prompt"):
        make_needles(Whole(), 4, 600, seed=0)
    usual = equal_answers(pairs_tokenizer(), 0)
    with pytest.raises(TextError, match="none of 200 prompts that were drawn has an answer that fits"):
        make_passkeys(tiny_tokenizer(), 1, 600, 0, lambda question: usual(question) and False)


# --- two probes as one


def two_probes(model, batch_size=1, texts=3, needles=7):
    policy = registry.create("policy", "snapkv")
    text = PromptProbe(model, tiny_ids(96, texts), policy=policy, prefill_length=48, batch_size=batch_size)
    ids = tiny_ids(53, needles)
    return text, PromptProbe(model, ids, policy=policy, prefill_length=48, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_each_part_of_a_joined_probe_has_half_of_the_weight(batch_size):
    model, table = tiny_model("Llama", layers=2), torch.full((2, 2), 35)
    text, needles = two_probes(model, batch_size)
    joined = JoinedProbe(text, needles)
    half = (text.loss(table).mean() + needles.loss(table).mean()) / 2
    assert joined.num_sequences == 10 and joined.context_length == 48
    assert float(joined.loss(table).mean()) == pytest.approx(float(half), rel=1e-9)
    rows = list(joined.token_losses(table))
    texts = torch.tensor([row.shape[1] == 48 for row in rows]).cumsum(0)
    assert int(texts[-1]) == 3 and float((texts - 0.3 * torch.arange(1, 11)).abs().max()) < 1, "spread evenly"
    found = torch.stack([row.double().mean() for row in rows])
    torch.testing.assert_close(found, joined.loss(table), rtol=1e-6, atol=0)


def test_a_joined_probe_hands_a_soft_loss_to_its_parts(monkeypatch):
    text, needles = two_probes(tiny_model("Llama", layers=2), texts=1, needles=3)
    joined, asked = JoinedProbe(text, needles), []

    def soft_loss(self, bias, target="full", *, sequence=None):
        asked.append(("text" if self is text else "needles", target, sequence))
        return torch.tensor([5.0 if self is text else 1.0 + sequence])

    monkeypatch.setattr(PromptProbe, "soft_loss", soft_loss)
    every = joined.soft_loss(lambda *_: None)
    assert float(every.mean()) == pytest.approx((5.0 + (1 + 2 + 3) / 3) / 2)
    torch.testing.assert_close(torch.cat([joined.soft_loss(None, sequence=i) for i in range(4)]), every)
    asked.clear()
    joined.soft_loss(None, "text", sequence=3)
    assert asked == [("needles", "text", 2)]
    with pytest.raises(PluginError, match="there are 4 sequences, from 0; got 4"):
        joined.soft_loss(None, sequence=4)


def test_probes_of_other_contexts_are_not_joined():
    model = tiny_model("Llama", layers=2)
    with pytest.raises(BudgetError, match="context_length differs: 96 and 48"):
        JoinedProbe(TransformersProbe(model, tiny_ids(96, 2)), two_probes(model)[1])


# --- the pairs of the pruner


@pytest.mark.parametrize(("tokens", "chunks"), [(48, 4), (50, 4), (31, 1), (5, 1), (1, 1)])
def test_pairs_add_up_to_the_mean_loss(tokens, chunks):
    losses = torch.rand(3, tokens, dtype=torch.float64)
    parts = list(search.chunk_parts([losses[:2], losses[2:]]))
    assert [tuple(part.shape) for part in parts] == [(2, chunks), (1, chunks)]
    torch.testing.assert_close(torch.cat(parts).sum(1), losses.mean(1))


@dataclass(frozen=True, slots=True)
class Skewed(BudgetAllocator):
    """The first trial is nearly uniform, the others are far from it."""

    skew: float = 0.1

    def shares(self, importance, budget):
        shares = torch.ones(budget.shape)
        shares[0, 0] += self.skew
        return shares

    @classmethod
    def suggest(cls, trial):
        return cls(trial.suggest_float("skew", *((30, 60) if trial.number else (0.1, 0.1))))


@pytest.mark.parametrize("objective", ["retrieval", "mixed"])
def test_a_bad_trial_is_stopped_whatever_it_is_measured_on(settings, corpus, monkeypatch, objective):
    def losses(self, capacities):
        spread = float((capacities.double() / capacities.double().mean() - 1).abs().mean())
        for index in range(len(self.sequences)):
            tokens = self.sequences.shape[1] - self.first_scored
            yield 3 + spread + 0.01 * torch.rand(1, tokens, generator=torch.Generator().manual_seed(index))

    for probe in (TransformersProbe, PromptProbe):
        monkeypatch.setattr(probe, "token_losses", losses)
    registered = registry.get
    monkeypatch.setattr(registry, "get", lambda role, name: Skewed if name == "skewed" else registered(role, name))
    create = registry.create
    monkeypatch.setattr(
        registry,
        "create",
        lambda role, name, params=None: Skewed(**(params or {})) if name == "skewed" else create(role, name, params),
    )
    plan = tune(a_model(), corpus, replace(settings, objective=objective, allocator="skewed", trials=4, sequences=4))
    trials = the_study(settings).trials
    assert [bool(x.user_attrs.get("kvpolicy_stopped")) for x in trials] == [False, True, True, True]
    whole = 16 if objective == "retrieval" else 32
    assert len(trials[0].intermediate_values) == whole
    assert all(8 <= len(x.intermediate_values) < whole for x in trials[1:])
    assert plan.levels[0].comparison["trials_stopped_early"] == 3


# --- the search


def needles_of(settings, length):
    made = make_needles(tiny_tokenizer(), 8, length, FIRST_SEED + 3 * settings.seed)
    return made, make_needles(tiny_tokenizer(), 32, length, FIRST_SEED + 3 * settings.seed + 1, without=made.answers)


@pytest.mark.parametrize(
    ("objective", "policy"),
    [
        ("retrieval", "streaming"),
        ("mixed", "snapkv"),
        pytest.param("retrieval", "snapkv", marks=pytest.mark.slow),
        pytest.param("mixed", "streaming", marks=pytest.mark.slow),
    ],
)
def test_the_figures_of_a_level_are_those_of_its_capacities(settings, corpus, policy, objective):
    context = 2 * LENGTH if (policy, objective) == ("snapkv", "mixed") else LENGTH
    settings = replace(settings, policy=policy, objective=objective, context_length=context)
    model = a_model()
    plan = tune(model, corpus, settings)
    level, rule = plan.levels[0], registry.create("policy", policy)
    assert plan.provenance["objective"] == objective
    assert plan.provenance["needles"] == {"search": 8, "heldout": 32, "length": LENGTH}
    found, answers = level.retrieval["answer_loss"], {}
    table = plan.capacities(LENGTH, retention=0.4)
    for part, needles in zip(("search", "heldout"), needles_of(settings, LENGTH), strict=True):
        probe = PromptProbe(model, needles.sequences, policy=rule, prefill_length=LENGTH)
        answers[part] = probe.loss(table)
        assert found[part] == pytest.approx(float(answers[part].mean()), rel=1e-6)
    uniform = torch.full((2, 2), round(0.4 * LENGTH))
    answers |= {"heldout_full": probe.full_loss(), "heldout_uniform": probe.loss(uniform)}
    assert found == pytest.approx({name: float(loss.mean()) for name, loss in answers.items()}, rel=1e-6)

    sequences = corpus.sequences("heldout", 8, context)
    text = TransformersProbe(model, sequences) if policy == "streaming" else PromptProbe(model, sequences, policy=rule)
    own = text.loss(plan.capacities(text.context_length, retention=0.4))
    assert level.perplexity["heldout"] == pytest.approx(float(own.mean().exp()), rel=1e-6)
    difference = float((answers["heldout"] - answers["heldout_uniform"]).mean())
    if objective == "mixed":
        other = torch.full((2, 2), round(0.4 * text.context_length))
        difference = (difference + float((own - text.loss(other)).mean())) / 2
    assert level.comparison["loss_minus_uniform"] == pytest.approx(difference, abs=1e-6)
    assert level.comparison["n"] == (32 if objective == "retrieval" else 40)


def test_the_value_of_a_trial_is_the_mean_of_what_it_is_measured_on(settings, corpus):
    model, settings = a_model(), replace(settings, objective="mixed", trials=3)
    plan = tune(model, corpus, settings)
    needles = make_needles(tiny_tokenizer(), 8, LENGTH, FIRST_SEED).sequences
    streaming = registry.create("policy", "streaming")
    probes = [TransformersProbe(model, corpus.sequences("search", 2, LENGTH))]
    probes += [PromptProbe(model, needles, policy=streaming, prefill_length=LENGTH)]
    budget = Budget(total=round(0.4 * LENGTH * 4), shape=(2, 2), floor=5, ceiling=LENGTH)
    uniform = torch.full((2, 2), round(0.4 * LENGTH))
    trials = [x for x in the_study(settings).trials if not x.user_attrs.get("kvpolicy_stopped")]
    for trial in trials:
        shares = registry.create("allocator", "baklava", trial.params).shares(plan.importance, budget)
        table = apportion(kept_fractions(shares, 0.4), budget)
        text, answers = (float((probe.loss(table) - probe.loss(uniform)).mean()) for probe in probes)
        assert trial.value == pytest.approx((text + answers) / 2, abs=1e-6)
    assert trials


def test_needles_want_a_tokenizer_and_room(settings, corpus):
    with pytest.raises(TextError, match=r"the objective retrieval makes prompts of its own, .* read_corpus"):
        tune(a_model(), replace(corpus, tokenizer=None), settings)
    with pytest.raises(TextError, match="too short for this task"):
        tune(a_model(), corpus, replace(settings, context_length=128))
    assert not settings.journal.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"objective": "mixed"}, 'objective was "retrieval", now "mixed"'), ({"sequences": 3}, "sequences was 2, now 3")],
)
def test_resume_with_another_objective_or_count_is_refused_by_name(settings, corpus, change, named):
    tune(a_model(), corpus, settings)
    with pytest.raises(StudyError, match=named):
        tune(a_model(), corpus, replace(settings, resume=True, **change))


def test_objectives_and_limits_out_of_range_are_refused(tmp_path):
    with pytest.raises(BudgetError, match="objective must be one of perplexity, retrieval, mixed, got 'facts'"):
        make_settings(tmp_path, objective="facts")
    for limit in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="max_loss is a part of the full cache's loss, above 0"):
            make_settings(tmp_path, max_loss=limit)
    with pytest.raises(BudgetError, match="sequences must be at least 1, got 0"):
        make_settings(tmp_path, sequences=0)


def test_more_sequences_are_searched_on_and_need_more_text(tmp_path):
    model, corpus = tiny_model("Llama", layers=2), make_corpus()
    settings = make_settings(tmp_path, sequences=7, trials=1)
    plan = run(settings, model, corpus)
    probe = TransformersProbe(model, corpus.sequences("search", 7, 64))
    found = float(probe.loss(plan.capacities(64, retention=0.4)).mean().exp())
    assert plan.levels[0].perplexity["search"] == pytest.approx(found, rel=1e-6)
    assert plan.provenance["search_sequences"] == 7
    with pytest.raises(TextError, match=r"a context of 64 with 19 search sequences needs 1216.* fewer sequences="):
        run(replace(settings, sequences=19), model, corpus)


# --- a limit on the loss


def test_the_relative_increase_and_its_interval():
    draw = torch.Generator().manual_seed(3)
    base = 2 + torch.rand(12, generator=draw, dtype=torch.float64)
    losses = base * (1.02 + 0.02 * torch.rand(12, generator=draw, dtype=torch.float64))
    value, low, high = relative_increase(losses, base)
    assert value == pytest.approx(float(losses.mean() / base.mean()) - 1)
    theirs = scipy.stats.bootstrap(
        (losses.numpy(), base.numpy()),
        lambda a, b, axis: a.mean(axis) / b.mean(axis) - 1,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=3e-4)
    assert low < value < high


def losses_by_kept(self, capacities):
    """A tenth more for a whole context that is not kept: the relative increase is the same on every sequence."""
    lost = 1 - float(capacities.double().mean()) / self.context_length
    for index in range(len(self.sequences)):
        yield torch.full((1, 48), (2 + 0.1 * index) * (1 + 0.1 * lost))


@pytest.mark.parametrize(("limit", "passing"), [(0.025, (0.9, 0.8)), (0.015, (0.9,)), (0.5, (0.9, 0.8, 0.7, 0.2))])
def test_the_search_stops_at_the_first_retention_over_the_limit(tmp_path, monkeypatch, limit, passing):
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_kept)
    settings = make_settings(tmp_path, retentions=(0.8, 0.2, 0.9, 0.7), max_loss=limit, allocator="uniform")
    plan = run(settings)
    assert [level.retention for level in plan.levels] == list(passing)
    for level in plan.levels:
        found = level.comparison["loss_over_full"]
        assert [found["increase"], *found["interval"]] == pytest.approx([0.1 * (1 - level.retention)] * 3, abs=1e-3)
    said = plan.provenance["max_loss"]
    assert (said["limit"], said["smallest"]) == (limit, passing[-1])
    assert said["bound"] == pytest.approx(0.1 * (1 - passing[-1]), abs=1e-3)
    failed = None if len(passing) == 4 else (0.8, 0.7)[len(passing) - 1]
    assert (said["failed"] or {}).get("retention") == failed
    begun = [r for r in (0.9, 0.8, 0.7, 0.2) if the_study(settings, r).trials]
    assert begun == [*passing, *([failed] if failed else [])]
    assert [cost["retention"] for cost in plan.provenance["calibration"]] == [None, *begun]


def test_where_nothing_keeps_within_the_limit_there_is_no_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_kept)
    settings = make_settings(tmp_path, retentions=(0.5, 0.9), max_loss=0.005, trials=1)
    with pytest.raises(BudgetError, match=r"within max_loss=0\.005: with 0\.9 kept the .* is \+1\.0\d% .* resume=True"):
        run(settings)
    assert len(the_study(settings, 0.9).trials) == 1
    assert run(replace(settings, resume=True, max_loss=0.02)).retentions == (0.9,)


# --- what was run


class Notes(Progress):
    def __init__(self):
        self.said = ""

    def note(self, message):
        self.said += message + "\n"


def counted(model):
    """A list that grows by the shape of the tokens of each forward."""
    seen, forward = [], model.forward

    def counting(input_ids=None, **more):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids, **more)

    model.forward = counting
    return seen


def test_what_a_search_ran_is_in_the_plan_and_adds_up_over_runs(tmp_path):
    settings = make_settings(tmp_path, retentions=(0.4, 0.2), trials=1)
    costs = run(settings).provenance["calibration"]
    assert [cost["retention"] for cost in costs] == [None, 0.4, 0.2]
    prompts = [len(prompt) for prompt in make_corpus().prompts(64)]
    assert [cost["forwards"] for cost in costs] == [6, 8, 8]
    assert [cost["tokens"] for cost in costs] == [sum(prompts), 8 * 64, 8 * 64]
    assert all(cost["seconds"] > 0 for cost in costs)
    again = run(replace(settings, resume=True, trials=2)).provenance["calibration"]
    second = [len(the_study(settings, r).trials[1].intermediate_values) // 4 for r in (0.4, 0.2)]  # sequences
    assert [cost["forwards"] for cost in again] == [12, *(8 + 4 + count for count in second)], "uniform again too"
    assert all(new["seconds"] > old["seconds"] for new, old in zip(again, costs, strict=True))


def test_an_interrupted_search_keeps_what_it_ran(tmp_path, monkeypatch):
    settings = make_settings(tmp_path, trials=2)
    with monkeypatch.context() as patch:
        patch.setattr(search, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    costs = run(replace(settings, resume=True)).provenance["calibration"]
    assert [cost["forwards"] for cost in costs] == [12, 4 + 12]


@pytest.mark.parametrize(
    ("objective", "policy"),
    [
        ("perplexity", "h2o"),
        ("mixed", "streaming"),
        pytest.param("retrieval", "h2o", marks=pytest.mark.slow),
        pytest.param("mixed", "h2o", marks=pytest.mark.slow),
    ],
)
def test_the_cost_that_is_announced_is_not_exceeded(settings, corpus, objective, policy):
    model, notes = a_model(), Notes()
    settings = replace(settings, objective=objective, policy=policy, context_length=2 * LENGTH, trials=1)
    seen = counted(model)
    tune(model, corpus, settings, progress=notes)
    whole = sum(rows for rows, length in seen if length >= LENGTH // 2)
    behind = sum(rows for rows, length in seen if length < 20)  # answers behind a prompt
    said = int(re.search(r"at most (\d+) forwards", notes.said)[1])
    assert whole <= said + 2 * 10, "pace and the timing of prompts are not announced"
    assert behind <= said


# --- pass keys


def test_a_passkey_score_is_that_of_greedy_generation(smollm2):
    model, tokenizer = smollm2
    questions = make_passkeys(tokenizer, 3, 160, 0, equal_answers(tokenizer, 0))
    rule = registry.create("policy", "streaming")
    tables = [torch.full((30, 3), 60)]
    task = RetrievalTask("passkey", model, tokenizer, questions)
    found = PasskeyCheck(model, tokenizer, questions, rule, StudyNotes(optuna.create_study())).scores(tables)
    method = Method("plan", "streaming", rule)
    expected = [1 - float(task.measure(method, lambda _, t=table: t).losses.mean()) for table in tables]
    assert found[0] == 1.0 and found[1] == pytest.approx(expected)
    assert min(found[1]) < 1, "this model loses some"


def test_a_model_that_cannot_do_the_task_gets_no_scores(settings, corpus):
    plan = tune(a_model(), corpus, settings)
    assert plan.provenance["passkey"] == {"full": 0.0, "n": 20, "length": LENGTH}
    assert "passkey" not in plan.levels[0].retrieval


def test_passkey_scores_are_kept_in_the_study(settings, corpus, monkeypatch):
    asked = []

    def measured(self, whole, pairs):
        asked.append([int(table.sum()) for table in (whole, *(table for table, _ in pairs))])
        return [0.95, 0.85, 0.9]

    monkeypatch.setattr(PasskeyCheck, "_measured", measured)
    settings = replace(settings, retentions=(0.3, 0.6), objective="perplexity")
    plan = tune(a_model(), corpus, settings)
    assert asked == [[4 * LENGTH, round(0.6 * 4 * LENGTH), round(0.3 * 4 * LENGTH)]]
    facts = {"full": 0.95, "n": 20, "length": LENGTH}
    assert [level.retrieval["passkey"] for level in plan.levels] == [{"score": 0.85, **facts}, {"score": 0.9, **facts}]
    again = tune(a_model(), corpus, replace(settings, resume=True))
    assert len(asked) == 1 and [x.retrieval for x in again.levels] == [x.retrieval for x in plan.levels]


def test_the_passkey_check_is_left_out_with_a_reason(tmp_path, corpus):
    notes = Notes()
    settings = make_settings(tmp_path, trials=1)
    plan = tune(a_model(), corpus, settings, progress=notes)
    assert "a prompt of 64 tokens is too short" in plan.provenance["passkey"]["skipped"]
    assert "no passkey check: a prompt of 64 tokens is too short" in notes.said
    assert "kvpolicy_passkey" not in str(open_storage(settings.storage).get_all_studies())
