"""Tasks whose rows are read from local files, and what is said of files that are not right."""

import json
import os

import pytest

from kvpolicy import PluginError, TextError
from kvpolicy.plugins.task_role import Turn
from kvpolicy.tasks.babilong import BABILongTask
from kvpolicy.tasks.longbench import LongBenchTask
from kvpolicy.tasks.own_file import FileTask
from kvpolicy.tasks.row_file import read_rows
from kvpolicy.tasks.ruler import RulerTask
from kvpolicy.tasks.scbench import SCBenchTask
from tests.tiny_checkpoint import tiny_tokenizer

PROMPTS = {
    "trec": "Types.\n\n{context}\n{input}",
    "gov_report": "Report:\n{context}\n\nSummary:",
    "lcc": "{context}Next:",
}
PROMPTS |= {"repobench-p": "Code.\n{context}{input}Next:", "hotpotqa": "{context}\nQuestion: {input}\nAnswer:"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def folder(tmp_path):
    """folder(name, *rows): writes a file of rows beside LongBench's prompts, and gives the folder."""
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(PROMPTS))

    def write(name, *rows):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return str(tmp_path)

    return write


def row(**fields):
    return {"input": "", "context": "", "answers": ["yes"], "all_classes": [], **fields}


# --- LongBench


def only(task, tokenizer, length=4000):
    (sample,) = task.samples(tokenizer, 5, length, 0)
    return sample, tokenizer.decode(sample.context), tokenizer.decode(sample.questions[0])


def test_a_prompt_is_divided_behind_its_context(folder, tokenizer):
    data = folder("hotpotqa.jsonl", row(context="a {input} b", input="why?"))
    _, context, question = only(LongBenchTask("hotpotqa", data), tokenizer)
    assert context == "a {input} b"  # what stands in a text is no mark
    assert question == "\nQuestion: why?\nAnswer:"


def test_code_before_the_next_line_belongs_to_the_context(folder, tokenizer):
    data = folder("repobench-p.jsonl", row(context="x = 1\n", input="y = 2\n", answers=["z = 3"]))
    _, context, question = only(LongBenchTask("repobench-p", data), tokenizer)
    assert (context, question) == ("Code.\nx = 1\ny = 2\n", "Next:")


def test_rows_of_longbench_e_have_the_same_prompts(folder, tokenizer):
    data = folder(
        "trec_e.jsonl", row(context="Question: q\nType: Food", input="Question: r\nType:", all_classes=["Food"])
    )
    task = LongBenchTask("trec_e", data)
    sample, context, question = only(task, tokenizer)
    assert context == "Types.\n\nQuestion: q\nType: Food"
    assert question == "\nQuestion: r\nType:"
    assert sample.turns[0].classes == ("Food",)
    assert (task.max_new_tokens, task.metric) == (64, "accuracy")


def test_examples_and_code_stay_out_of_the_chat_template(folder):
    chatting = tiny_tokenizer()
    chatting.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[go]"
    for name, is_chat in (("gov_report", True), ("trec", False), ("lcc", False)):
        data = folder(f"{name}.jsonl", row(context="words", all_classes=["x"]))
        assert only(LongBenchTask(name, data), chatting)[1].startswith("[user]") == is_chat


@pytest.mark.parametrize("length", [60, 61, 99])
def test_a_long_prompt_loses_its_middle(length, folder, tokenizer):
    words = " ".join(f"ba{number}" for number in range(100))
    sample, context, question = only(
        LongBenchTask("gov_report", folder("gov_report.jsonl", row(context=words))), tokenizer, length
    )
    assert length - 1 <= sample.length <= length
    assert context.startswith("Report:\nba0 ba1")
    assert context.endswith("ba98 ba99")
    assert question == "\n\nSummary:"
    whole = len(sample.context) + len(sample.questions[0])
    before = tokenizer(context.partition("ba98")[0]).input_ids
    assert len(before) > whole / 4  # both halves are there


def test_a_question_that_fills_the_prompt_is_refused(folder, tokenizer):
    data = folder("hotpotqa.jsonl", row(context="words", input="why " * 50))
    with pytest.raises(TextError, match=r"hotpotqa\.jsonl, line 1: its question alone is too long: give a context of"):
        LongBenchTask("hotpotqa", data).samples(tokenizer, 1, 40, 0)


def test_answers_are_scored_by_the_task(folder):
    data = folder("x.jsonl")
    right = Turn("", ("True Grit", "grit"), classes=("True Grit", "Food"))
    for name, answer, expected in [
        ("triviaqa", "\n\nthe grit\nQuestion: more", 1),
        ("hotpotqa", "grit\nno", 2 / 3),
        ("trec", "True Grit\nFood", 1),
        ("lcc", "# x\ngrit", 1),
        ("gov_report", "grit", 1),
        ("samsum", "grit\nDialogue: x", 1),
    ]:
        assert LongBenchTask(name, data).score(answer, right) == pytest.approx(expected, abs=1e-6)
    assert LongBenchTask("passage_count", data).score("3 or 4", Turn("", ("3",))) == 1 / 2
    assert LongBenchTask("passage_retrieval_en", data).score("Paragraph 3", Turn("", ("Paragraph 3",))) == 1


def test_what_longbench_needs_is_named(tmp_path, tokenizer):
    with pytest.raises(TextError, match=r"trec\.jsonl, and there is no such file"):
        LongBenchTask("trec", str(tmp_path)).samples(tokenizer, 1, 100, 0)
    (tmp_path / "trec.jsonl").write_text(json.dumps(row(all_classes=["yes"])))
    (tmp_path / "dataset2prompt.json").write_text('{"lcc": "{context}"}')
    with pytest.raises(TextError, match=r"dataset2prompt\.json: 'trec' is missing; the object has lcc"):
        LongBenchTask("trec", str(tmp_path)).samples(tokenizer, 1, 100, 0)
    with pytest.raises(PluginError, match="in Chinese"):
        LongBenchTask("lsht")


# --- the others


def test_rulers_own_files_are_asked_in_their_last_line(folder, tokenizer):
    rows = [{"input": "Lines.\nhay\n\nQuestion: which?", "outputs": ["a", "b"], "answer_prefix": " Answer:"}]
    data = folder("qa_1.jsonl", *rows)
    sample, context, question = only(RulerTask("qa_1", data), tokenizer)
    assert (context, question) == ("Lines.\nhay\n", "\nQuestion: which? Answer:")
    assert sample.turns[0].answers == ("a", "b")
    assert RulerTask("qa_1").score("B!", sample.turns[0]) == 1
    os.mkdir(f"{data}/niah_single_2")
    with open(f"{data}/niah_single_2/validation.jsonl", "w") as file:
        file.write(json.dumps(rows[0]))
    assert only(RulerTask("niah_single_2", data), tokenizer)[1] == context


def test_scbenchs_turns_are_asked_in_order(folder, tokenizer):
    turns = [{"input": "Key: a", "answer": "1"}, {"input": "Key: b", "answer": "2"}]
    data = folder("scbench_kv.jsonl", {"context": "{...}", "multi_turns": turns})
    sample, context, question = only(SCBenchTask("kv", data), tokenizer)
    assert context.endswith("{...}")
    assert question == "\n\nKey: a"
    assert [turn.answers for turn in sample.turns] == [("1",), ("2",)]


def test_choices_are_answered_by_their_letter(folder, tokenizer):
    turns = [{"input": "Who?", "options": ["Ann", "Bob", "Cy", "Di"], "answer": "Bob"}]
    task = SCBenchTask("choice_eng", folder("scbench_choice_eng.jsonl", {"context": "Book.", "multi_turns": turns}))
    turn = only(task, tokenizer)[0].turns[0]
    assert turn.answers == ("B",)
    assert [task.score(answer, turn) for answer in ("B", " B. Bob", "A or B", "Bob", "")] == [1, 1, 0, 0, 0]


def test_scbench_scores():
    turn = Turn("", ("12", "ab"))
    assert [SCBenchTask(name).score("12, then 13", turn) for name in ("kv", "passkey", "mf", "vt")] == [1, 1, 1, 0.5]
    assert SCBenchTask("many_shot").score("AB", turn) == 1


def test_babilong_reads_the_rows_of_a_length(folder, tokenizer):
    data = folder("qa1_4k.jsonl", {"input": "Tom went.", "question": "Where is Tom? ", "target": "garden"})
    task = BABILongTask("qa1_4k", data)
    sample, context, question = only(task, tokenizer)
    assert context.endswith("\n\nTom went.")
    assert question == "\n\nQuestion: Where is Tom? Give one word.\nAnswer:"
    assert task.score(" The garden.", sample.turns[0]) == 1
    with pytest.raises(PluginError, match="no task 'babilong/qa9'"):
        BABILongTask("qa9_4k")


def test_a_users_own_file(folder, tokenizer):
    data = folder("mine.jsonl", {"context": "Sky is blue.", "question": "Colour?", "answers": ["blue", 5]})
    task = FileTask(f"{data}/mine.jsonl", max_new_tokens=5)
    sample, context, question = only(task, tokenizer)
    assert (context, question) == ("Sky is blue.", "\n\nQuestion: Colour?\nAnswer:")
    assert task.score("the Blue", sample.turns[0]) == task.score("5", sample.turns[0]) == 1
    with pytest.raises(TextError, match=r"line 1: the prompt has \d+ tokens, more than the 9 that were asked for"):
        task.samples(tokenizer, 1, 9, 0)
    with pytest.raises(TextError, match="task_file=FILE"):
        FileTask().samples(tokenizer, 1, 9, 0)


def test_rows_are_drawn_by_seed_in_the_order_of_the_file(folder, tokenizer):
    rows = [{"context": f"ba{number}", "question": "?", "answers": ["x"]} for number in range(30)]
    task = FileTask(f"{folder('mine.jsonl', *rows)}/mine.jsonl")
    drawn = [[tokenizer.decode(s.context) for s in task.samples(tokenizer, 6, 100, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [int(name[2:]) for name in drawn[0]] == sorted({int(name[2:]) for name in drawn[0]})
    assert len(task.samples(tokenizer, 99, 100, 0)) == 30


# --- files that are not right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('{"a": 1}\n\n{"a":', "line 3: no complete JSON"),
        ("[1]", "line 1: a list, expected an object"),
        ("[" * 100_000, "line 1: no complete JSON"),
        ('{"a": ' + "1" * 5000 + "}", "line 1: no complete JSON"),
    ],
)
def test_what_is_wrong_is_told_with_the_line(text, expected, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(TextError, match=f"rows.jsonl.*{expected}") as error:
        read_rows(path)
    assert "\n" not in str(error.value)


def test_only_regular_files_of_text_are_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff')
    with pytest.raises(TextError, match="line 2: byte 0 is not UTF-8"):
        read_rows(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match="pipe: a pipe or a device"):
        read_rows(tmp_path / "pipe")
    with pytest.raises(TextError, match="directory"):
        read_rows(tmp_path)
    monkeypatch.setattr("kvpolicy.tasks.row_file.MAX_BYTES", 4)
    with pytest.raises(TextError, match="larger than"):
        read_rows(path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"context": 1}, "'question' is missing; the object has context"),
        ({"context": [], "question": "q", "answers": ["a"]}, "'context' is a list, expected a text"),
        ({"context": "c", "question": "q", "answers": []}, "'answers' is a list, expected texts"),
        ({"context": "c", "question": "q", "answers": [{}]}, "'answers' is an object, expected texts"),
        ({"context": "c", "question": True, "answers": ["a"]}, "'question' is True, expected a text"),
    ],
)
def test_a_field_that_is_not_right_is_named(fields, expected, folder, tokenizer):
    task = FileTask(f"{folder('mine.jsonl', fields)}/mine.jsonl")
    with pytest.raises(TextError, match=f"mine.jsonl, line 1: {expected}"):
        task.samples(tokenizer, 1, 100, 0)


def test_a_mark_at_the_beginning_of_a_file_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [each.value for each in read_rows(path)] == [{"a": 1}, {"a": 2}]
