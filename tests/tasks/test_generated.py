"""Tasks that are made here: exact lengths under two tokenizers, equal for a seed, answers where they should stand."""

import re
from itertools import pairwise

import pytest

from kvpolicy import ModelError, PluginError, TextError
from kvpolicy.tasks.needle_grid import NeedleGridTask
from kvpolicy.tasks.questions import make_key_values, make_passkeys
from kvpolicy.tasks.recalled_number import KeyValueTask, PasskeyTask
from kvpolicy.tasks.ruler import RulerTask
from kvpolicy.tasks.scbench import SCBenchTask
from tests.tiny_checkpoint import tiny_tokenizer

RULER = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
EXACT = [
    *(RulerTask(name) for name in RULER),
    *(SCBenchTask(name) for name in ("kv", "prefix_suffix", "vt")),
    PasskeyTask(),
    KeyValueTask(),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chatting():
    """A tokenizer whose chat template names who speaks."""
    made = tiny_tokenizer()
    made.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


@pytest.mark.parametrize("task", EXACT, ids=str)
@pytest.mark.parametrize("length", [2900, 3101])
def test_lengths_are_exact(task, length, tokenizer, chatting):
    for each in (tokenizer, chatting):
        samples = task.samples(each, 2, length, seed=3)
        assert [sample.length for sample in samples] == [length, length]
        assert all(len(sample.questions) == len(sample.turns) for sample in samples)


@pytest.mark.parametrize("task", EXACT, ids=str)
def test_a_seed_gives_the_same_samples_and_another_others(task, tokenizer):
    first, again, other = (task.samples(tokenizer, 2, 2900, seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0] != first[1]
    assert first != other


@pytest.mark.parametrize("task", EXACT, ids=str)
def test_answers_stand_in_the_context_and_are_right(task, tokenizer):
    for sample in task.samples(tokenizer, 2, 2900, seed=0):
        context = tokenizer.decode(sample.context)
        for turn in sample.turns:
            assert all(answer in context for answer in turn.answers)
            assert task.score(f" {' '.join(turn.answers)}.", turn) == 1
            assert task.score("nothing of it", turn) == 0


@pytest.mark.parametrize("task", EXACT, ids=str)
def test_a_length_without_room_says_how_much_is_needed(task, tokenizer):
    with pytest.raises(TextError, match="too short") as error:
        task.samples(tokenizer, 1, 40, seed=0)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert task.samples(tokenizer, 1, least + 400, seed=0)[0].length == least + 400


def test_a_needle_in_filler_stands_alone(tokenizer):
    sample = RulerTask("niah_single_1").samples(tokenizer, 1, 2000, seed=0)[0]
    context = tokenizer.decode(sample.context)
    assert context.count("The secret number for") == 1
    assert len(set(context.split("\n"))) == 3  # the head with its filler, the line of filler, the needle


def test_needles_among_needles_have_a_key_each(tokenizer):
    sample = RulerTask("niah_multikey_2").samples(tokenizer, 1, 3000, seed=0)[0]
    keys = re.findall(r"number for (\S+) is \d{7}\.", tokenizer.decode(sample.context))
    asked = re.search(r"give for (\S+)\?", sample.turns[0].question)[1]
    assert len(keys) > 20
    assert keys.count(asked) == 1


def test_a_chain_of_variables_is_in_order(tokenizer):
    sample = RulerTask("vt").samples(tokenizer, 1, 3000, seed=0)[0]
    names, context = sample.turns[0].answers, tokenizer.decode(sample.context)
    assert len(names) == 5
    lines = [f"VAR {later} = VAR {first}" for first, later in pairwise(names)]
    places = [context.index(line) for line in lines]
    assert places == sorted(places)


@pytest.mark.parametrize(("length", "often", "seldom"), [(3500, 6, 1), (6000, 30, 3)])
def test_common_words_stand_as_often_as_ruler_says(length, often, seldom, tokenizer):
    sample = RulerTask("cwe").samples(tokenizer, 1, length, seed=0)[0]
    body = tokenizer.decode(sample.context).rpartition("Remember those.")[2]
    words = re.findall(r"\d+\. (\S+)", body)
    counts = {word: words.count(word) for word in words}
    assert {word for word, count in counts.items() if count == often} == set(sample.turns[0].answers)
    assert {count for word, count in counts.items() if word not in sample.turns[0].answers} == {seldom}


def test_frequent_words_are_the_most_frequent(tokenizer):
    sample = RulerTask("fwe").samples(tokenizer, 1, 4000, seed=0)[0]
    words = re.findall(r"\b[a-z]{6}\b", tokenizer.decode(sample.context).rpartition("most often.")[2])
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert set(ranked[:3]) == set(sample.turns[0].answers)
    assert words.count(ranked[2]) > words.count(ranked[3])


def test_one_string_has_both_ends_and_others_have_one(tokenizer):
    sample = SCBenchTask("prefix_suffix").samples(tokenizer, 1, 4000, seed=0)[0]
    lines = tokenizer.decode(sample.context).split("\n")
    for turn in sample.turns:
        first, last = re.findall(r'"(\w+)"', turn.question)
        assert [line for line in lines if line.startswith(first) and line.endswith(last)] == list(turn.answers)
    assert any(line.startswith(first) and not line.endswith(last) for line in lines)


def test_turns_of_one_context_are_different(tokenizer):
    sample = SCBenchTask("kv", turns=3).samples(tokenizer, 1, 3000, seed=0)[0]
    assert len({turn.question for turn in sample.turns}) == len({turn.answers for turn in sample.turns}) == 3


def test_the_grid_has_every_depth_of_every_length(tokenizer):
    task = NeedleGridTask(depths=3, lengths=2)
    samples = task.samples(tokenizer, 7, 1000, seed=0)
    cells = [(sample.about["length"], sample.about["depth"]) for sample in samples]
    assert cells == [(500, 0.0), (1000, 0.0), (500, 0.5), (1000, 0.5), (500, 1.0), (1000, 1.0), (500, 0.0)]
    assert [sample.length for sample in samples] == [length for length, _ in cells]
    context = tokenizer.decode(samples[5].context)
    assert context.rstrip().endswith(f"is {samples[5].turns[0].answers[0]}.")


def test_numbers_are_the_prompts_of_compare(tokenizer):
    for task, make in ((PasskeyTask(), make_passkeys), (KeyValueTask(), make_key_values)):
        samples, questions = task.samples(tokenizer, 3, 500, 7), make(tokenizer, 3, 500, 7)
        for sample, question in zip(samples, questions, strict=True):
            assert [*sample.context, *sample.questions[0]] == question.ids.tolist()
            assert sample.turns[0].answers == (question.answer,)


def test_a_chat_template_stands_around_every_turn(chatting):
    sample = SCBenchTask("kv", turns=2).samples(chatting, 1, 3000, seed=0)[0]
    context, first, second = map(chatting.decode, (sample.context, *sample.questions))
    assert context.startswith("<s>[user]The JSON object")
    assert first.endswith("</s>[assistant] The value is")
    assert second.startswith("</s>[user]\nWhich value")
    assert second.endswith("</s>[assistant] The value is")


def test_a_template_that_drops_words_is_refused(chatting):
    lossy = tiny_tokenizer()
    lossy.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ModelError, match="leaves out"):
        RulerTask("vt").samples(lossy, 1, 3000, seed=0)


def test_names_that_are_none_are_refused_with_those_that_are():
    with pytest.raises(PluginError, match=r"no task 'ruler/niah_single_9' .did you mean 'niah_single_"):
        RulerTask("niah_single_9")
    with pytest.raises(PluginError, match="metric that kvpolicy does not compute"):
        SCBenchTask("summary")
    with pytest.raises(PluginError, match="2 depths"):
        NeedleGridTask(depths=1)
    with pytest.raises(PluginError, match="0 turns"):
        SCBenchTask("kv", turns=0)


@pytest.mark.parametrize("name", ["niah_single_2", "qa_1"])
def test_tasks_of_files_say_which(name, tokenizer):
    with pytest.raises(TextError, match=rf"write {name}.jsonl with RULER's scripts"):
        RulerTask(name).samples(tokenizer, 1, 1000, seed=0)


def test_lengths_are_exact_for_smollm2(smollm2):
    tokenizer = smollm2[1]
    for task in EXACT:
        assert task.samples(tokenizer, 1, 1100, seed=1)[0].length == 1100
