"""Each metric against answers computed by hand, and the oddities that a benchmark's own code has."""

import pytest

from kvpolicy.tasks import metrics


def test_normalized_is_squads():
    assert metrics.normalized("The  Answer's: an APPLE, a-pear.") == "answers apple apear"
    assert metrics.exact_match("the Apple!", "apple") == 1
    assert metrics.exact_match("apples", "apple") == 0


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Paris", "Paris", 1.0),
        ("It is Paris.", "Paris", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # 1 of 3 words said, 1 of 1 true
        ("red red blue", "red green", 2 / 5),  # "red" counts once: it is there once
        ("red red blue", "red red", 4 / 5),
        ("Rome", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("the", "a", 0.0),  # articles alone leave nothing
    ],
)
def test_f1(answer, truth, expected):
    assert metrics.f1(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "precision", "recall"),
    [
        ("a cat sat", "a cat sat", 1, 1),
        ("the cat sat on the mat. it slept", "a cat sat on a mat", 4 / 7, 4 / 5),  # different words: 7 and 5
        ("one two", "two one", 1 / 2, 1 / 2),  # the order counts
        ("one. two", "two. one", 1, 1),  # sentences are matched each with each
        ("x", "y", 0, 0),
        ("One", "one", 0, 0),  # letters are compared as they are
    ],
)
def test_rouge_l(answer, truth, precision, recall):
    expected = 2 * precision * recall / (precision + recall) if precision else 0
    assert metrics.rouge_l(answer, truth) == pytest.approx(expected, abs=1e-7)


def test_rouge_l_has_the_corners_of_its_package():
    assert metrics.rouge_l("", "truth") == metrics.rouge_l("...", "truth") == metrics.rouge_l("word", ".") == 0
    assert metrics.rouge_l("x. ", "x") == pytest.approx(2 / 3)  # behind the full stop stands an empty word: 1 of 2 is x


def test_code_similarity_looks_at_the_first_line_of_code():
    assert metrics.code_similarity("```java\n// next\nint x = 1;\nint y;", "int x = 1;") == 1
    assert metrics.code_similarity("abcd", "abxd") == 0.75  # 3 of 4 characters: 2 * 3 / 8
    assert metrics.code_similarity("ab", "abcdef") == 0.5  # 2 * 2 / 8
    assert metrics.code_similarity("abcdef", "abc") == 0.67  # 6 / 9, in whole percent
    assert metrics.code_similarity("# only a comment", "x") == 0
    assert metrics.code_similarity("", "") == 1


def test_classification_shares_the_point_among_the_classes_named():
    classes = ["Food", "Date", "Order, rank", "Speed"]
    assert metrics.classification("Food", "Food", classes) == 1
    assert metrics.classification("Food or Speed", "Food", classes) == 1 / 2
    assert metrics.classification("Date", "Food", classes) == 0
    assert metrics.classification("nothing", "Food", classes) == 0


def test_classification_leaves_out_parts_of_the_right_name_as_longbench_does():
    assert metrics.classification("other location", "other location", ["location", "other location"]) == 1
    skipped = ["a", "b", "a b"]  # "b" moves to the place that was looked at already
    assert metrics.classification("a b", "a b", skipped) == 1 / 2


def test_count_and_paragraph_are_parts_of_the_numbers_said():
    assert metrics.count("There are 7.", "7") == 1
    assert metrics.count("7 of 30, no, 8", "7") == pytest.approx(1 / 3)
    assert metrics.count("none", "7") == 0
    assert metrics.count("17", "7") == 0
    assert metrics.paragraph("Paragraph 12 or 3", "Paragraph 12") == 1 / 2
    assert metrics.paragraph("12", "no number") == 0


def test_rulers_string_matches():
    assert metrics.contained_part("abc DEF", ["ABC", "def", "xyz", "q"]) == 1 / 2
    assert metrics.contains_one("abc DEF", ["xyz", "def"]) == 1
    assert metrics.contains_one("abc", ["xyz"]) == 0


def test_rulers_published_answers_score_as_it_says():
    """Of Mistral-7B-Instruct-v0.2 on niah_single_1 at 4k, whose score is 100.0: so each number is the right one."""
    for answer, truth in (("8090293.", "8090293"), (": 3484601.", "3484601"), (": 4524499.", "4524499")):
        assert metrics.contained_part(answer, [truth]) == 1


def test_babilong_wants_one_label_that_is_not_in_the_question():
    places = ("garden", "kitchen", "Office")
    assert metrics.only_label("The Garden. Or the kitchen.", "garden", places, "Where is Tom?") == 1
    assert metrics.only_label("garden or kitchen", "garden", places, "Where is Tom?") == 0
    assert metrics.only_label("from the kitchen to the garden", "garden", places, "Where from the kitchen?") == 1
    assert metrics.only_label("office", "Office", places, "Where is Tom?") == 1
    assert metrics.only_label("cellar", "garden", places, "Where is Tom?") == 0


def test_first_line_and_first_number():
    assert metrics.first_line("\n\nTrue\nQuestion: more") == "True"
    assert metrics.first_number("about 42 or 43") == "42"
    assert metrics.first_number("none") == ""
