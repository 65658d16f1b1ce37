"""How right an answer is, from 0 to 1, by the rules of the benchmarks, so that figures can stand beside theirs.

Sources: SQuAD's F1 and exact match, arXiv:1606.05250; LongBench's `metrics.py`, arXiv:2308.14508; RULER's string match,
arXiv:2404.06654; BABILong's labels, arXiv:2406.10149. A benchmark's oddities are part of its rule and stand here too.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CODE = ("`", "#", "//")  # a line with one of these is a fence or a comment
_TINY = 1e-8  # in the denominator of ROUGE's F


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 where both are the same once `normalized`."""
    return float(normalized(answer) == normalized(truth))


def f1(answer: str, truth: str) -> float:
    """Precision and recall of the `normalized` words, each as often as it stands there, as one number."""
    words, true = normalized(answer).split(), normalized(truth).split()
    common = (Counter(words) & Counter(true)).total()
    return 2 * common / (len(words) + len(true)) if common else 0.0


def rouge_l(answer: str, truth: str) -> float:
    """ROUGE-L of whole summaries, as the package `rouge` 1.0.1 computes it, which LongBench uses.

    A sentence ends at every full stop. What counts are the different words of the longest common subsequences of every
    pair of sentences, over the different words of each text; 0 where one of the two has no sentence.
    """
    sentences, true = _sentences(answer), _sentences(truth)
    if not sentences or not true:
        return 0.0
    common = {word for one in true for other in sentences for word in _common_subsequence(one, other)}
    precision, recall = len(common) / len(_different(sentences)), len(common) / len(_different(true))
    return 2 * precision * recall / (precision + recall + _TINY)


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence. One of spaces alone has the empty word, as in `rouge`."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _different(sentences: Iterable[list[str]]) -> set[str]:
    return {word for sentence in sentences for word in sentence}


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The words of a longest one; of several the one that `rouge` finds, which goes on in `other` where ways tie."""
    lengths = [[0] * (len(other) + 1)]
    for word in one:
        row = [0]
        for j, second in enumerate(other):
            row.append(lengths[-1][j] + 1 if word == second else max(lengths[-1][j + 1], row[j]))
        lengths.append(row)
    words, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.append(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def code_similarity(answer: str, truth: str) -> float:
    """How alike the answer's first line of code and the right one are, in whole percent: `fuzz.ratio` of fuzzywuzzy, as
    it is without python-Levenshtein, over Python's difflib.

    Lines with a backtick, `#` or `//` are passed over.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NO_CODE)), "")
    if line == truth:
        return 1.0
    if not line or not truth:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, truth).ratio()) / 100


def classification(answer: str, truth: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, where the right one is among them.

    A class whose name is a part of the right one's does not count; where two of them stand next to each other in
    `classes` the second does, since LongBench shortens the list while it walks along it.
    """
    named = [name for name in classes if name in answer]
    index = 0
    while index < len(named):
        if named[index] in truth and named[index] != truth:
            named.remove(named[index])
        index += 1
    return 1 / len(named) if truth in named else 0.0


def count(answer: str, truth: str) -> float:
    """The part of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def paragraph(answer: str, truth: str) -> float:
    """`count` for the number of a right answer such as "Paragraph 7"."""
    number = re.search(r"Paragraph (\d+)", truth)
    return count(answer, number[1]) if number else 0.0


def contained_part(answer: str, truths: Sequence[str]) -> float:
    """The part of `truths` that stand in the answer, upper and lower case alike: RULER's `string_match_all`."""
    return sum(truth.lower() in answer.lower() for truth in truths) / len(truths)


def contains_one(answer: str, truths: Sequence[str]) -> float:
    """1 where one of `truths` stands in the answer, upper and lower case alike: RULER's `string_match_part`."""
    return float(any(truth.lower() in answer.lower() for truth in truths))


def first_number(answer: str) -> str:
    """The first whole number in an answer, '' if there is none."""
    number = re.search(r"\d+", answer)
    return number[0] if number else ""


def only_label(answer: str, truth: str, labels: Iterable[str], question: str) -> float:
    """1 where the answer's first sentence names the right label and no other but those of the question: BABILong's."""
    start = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = {label.lower() for label in labels if label.lower() in start and label.lower() not in question.lower()}
    return float(named == {truth.lower()})


def first_line(answer: str) -> str:
    """What stands before the first line end, those at the beginning left out."""
    return answer.lstrip("\n").split("\n")[0]
