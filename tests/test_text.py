"""Calibration text: repetitions, the split, sequences, and what is refused."""

import random
import time

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from kvpolicy import TextError
from kvpolicy.integrations.transformers import read_corpus
from kvpolicy.text.corpus import RUN, SEARCH_PART, Corpus, make_corpus, read_text, split, without_repetitions
from tests.tiny_checkpoint import text_of, tiny_tokenizer, words

LEAST = RUN + 30  # white space left out, from the middle of a word on: a whole run is in it


def runs(paragraphs):
    """Every stretch of `LEAST` bytes, wherever it begins, also across paragraph borders."""
    given = "".join("".join(paragraphs).split()).encode()
    return [given[i : i + LEAST] for i in range(len(given) - LEAST + 1)]


def join(given):
    return " ".join(given)


def han(count, seed=0):
    """`count` drawn Chinese characters without a space."""
    draw = random.Random(seed)
    return "".join(chr(draw.randrange(0x4E00, 0x9FA0)) for _ in range(count))


def characters(text):
    return [ord(c) for c in text]


def corpus(search=100, heldout=60, prefix=()):
    ids = torch.arange(search + heldout)
    return Corpus("a.txt", "0" * 64, ids[:search], ids[search:], prefix)


def planted_text():
    """Fresh paragraphs of 60 words with repetitions inside, across one border, and across two."""
    fresh = words(6000)
    paragraphs = [fresh[i : i + 60] for i in range(0, 6000, 60)]
    paragraphs.insert(60, list(paragraphs[3]))  # a whole paragraph again
    paragraphs.insert(70, [*words(10, seed=1), *paragraphs[5][:55], *words(5, seed=2)])  # 55 words inside another
    paragraphs.insert(80, paragraphs[10][-30:] + paragraphs[11][:30])  # across a border of the first occurrence
    paragraphs[90:90] = [paragraphs[20][:15], paragraphs[20][15:25], paragraphs[20][25:]]  # one paragraph cut in three
    return "\n\n".join(map(join, paragraphs))


def test_paragraphs_without_repetitions_are_kept_as_they_are():
    text = text_of(600)
    assert "\n\n".join(without_repetitions(text)) == text


def test_a_repeated_paragraph_is_dropped_once_and_the_first_is_kept():
    a, b = join(words(40, 1)), join(words(40, 2))
    assert without_repetitions("\n\n".join([a, b, a, b])) == [a, b]


@pytest.mark.parametrize(("shared", "kept"), [(RUN - 1, 2), (RUN, 1), (RUN + 1, 1)])
def test_a_shared_run_of_words_is_a_repetition_from_its_length_on(shared, kept):
    run = join(words(80))
    end = next(i for i in range(len(run)) if len("".join(run[:i].split())) == shared)
    text = f"{join(words(9, 1))} {run[:end]}\n\n{join(words(9, 2))} {run[:end]}"
    assert len(without_repetitions(text)) == kept


@pytest.mark.parametrize(("shared", "kept"), [(RUN // 3 - 1, 2), (RUN // 3, 1)])
def test_a_shared_run_of_characters_is_a_repetition_wherever_it_begins(shared, kept):
    run = han(shared)
    text = f"{han(50, 1)}{run}{han(31, 2)}\n\n{han(20, 3)}{run}{han(40, 4)}"
    assert len(without_repetitions(text)) == kept


def test_a_run_repeated_inside_one_paragraph_drops_it():
    assert without_repetitions(join(words(60) * 3)) == []
    assert without_repetitions(han(100) * 3) == []


@pytest.mark.parametrize(("length", "kept"), [(39, 2), (40, 1)])
def test_a_whole_paragraph_is_not_kept_twice_from_40_bytes_on(length, kept):
    repeated = "x" * length
    text = "\n\n".join([join(words(40, 1)), repeated, join(words(40, 2)), repeated, join(words(40, 3))])
    assert without_repetitions(text).count(repeated) == kept


def test_a_run_that_crosses_a_border_of_short_paragraphs_is_a_repetition():
    run = words(60)
    parts = [join(run[:12]), join(run[12:]), join(words(40, 5)), join(run[:10]), join(run[10:])]
    kept = without_repetitions("\n\n".join(parts))
    assert kept == parts[:4], "the run is complete only with the last paragraph"


def test_no_run_stands_twice_after_planted_repetitions():
    text = planted_text()
    before = runs(text.split("\n\n"))
    assert len(set(before)) < len(before), "the plant must have worked"
    after = runs(without_repetitions(text))
    assert len(after) > 3000
    assert len(set(after)) == len(after)


@pytest.mark.parametrize("source", ["planted", "default"])
def test_search_and_heldout_share_no_run(source):
    text = planted_text() if source == "planted" else read_text(None)[1]
    search, heldout = split(without_repetitions(text))
    assert runs(search) and runs(heldout)
    assert set(runs(search)).isdisjoint(runs(heldout))


def test_the_default_text_has_repetitions_across_the_border_if_they_are_not_dropped():
    search, heldout = split(read_text(None)[1].split("\n\n"))
    assert not set(runs(search)).isdisjoint(runs(heldout))


def test_the_split_is_contiguous_and_at_60_percent_of_the_text():
    paragraphs = [join(words(n, seed=n)) for n in (70, 10, 30, 200, 50, 90, 40, 60)]
    search, heldout = split(paragraphs)
    assert search + heldout == paragraphs
    total = len("".join(paragraphs))
    assert len("".join(search)) <= SEARCH_PART * total < len("".join([*search, heldout[0]]))


SCRIPTS = {
    "Chinese": (0x4E00, 0x9FA0, ""),
    "Japanese": (0x3041, 0x30FB, ""),
    "Thai": (0x0E01, 0x0E2F, ""),
    "Cyrillic": (0x0430, 0x0450, " "),
    "code without spaces": (0x28, 0x7E, ""),
}


def written(script, count, length, seed=0):
    """`count` paragraphs of `length` drawn characters."""
    first, last, space = SCRIPTS[script]
    draw = random.Random(seed)
    drawn = ["".join(chr(draw.randrange(first, last)) for _ in range(length)) for _ in range(count)]
    return [space.join(paragraph[i : i + 7] for i in range(0, length, 7)) for paragraph in drawn]


@pytest.mark.parametrize("length", [40, 150, 400])
@pytest.mark.parametrize("border", ["\n\n", "\n"], ids=["blank lines", "lines"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_has_heldout_paragraphs_that_stand_in_the_search_part(tmp_path, script, border, length):
    paragraphs = written(script, 160, length)
    (tmp_path / "twice.txt").write_text(border.join([*paragraphs, *paragraphs]), encoding="utf-8")
    made = make_corpus(tmp_path / "twice.txt", characters)
    search, heldout = ("".join(map(chr, part.tolist())) for part in (made.search, made.heldout))
    assert len(search) > 0.45 * 160 * length and len(heldout) > 0.3 * 160 * length
    assert [each for each in paragraphs if each in search and each in heldout] == []
    assert set(runs([search])).isdisjoint(runs([heldout]))


@pytest.mark.parametrize(
    "text", [join(words(12_000)), "\n".join(words(12_000)), han(12_000)], ids=["line", "lines", "han"]
)
def test_a_text_of_one_paragraph_is_split_at_60_percent_and_loses_nothing(tmp_path, text):
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    made = make_corpus(tmp_path / "one.txt", characters)
    assert len(made.search) / len(made.whole) == pytest.approx(SEARCH_PART, abs=0.1)
    kept = "".join("".join(map(chr, made.whole.tolist())).split())
    assert hash(kept) == hash("".join(text.split())), "a difference of long texts takes pytest minutes"


def test_a_long_paragraph_is_cut_at_lines_else_at_sentences_else_at_words():
    sentences = [f"{join(words(9, seed))}." for seed in range(400)]
    for text, ends in (("\n".join(sentences), "."), (" ".join(sentences), ". "), (join(words(900)), " ")):
        pieces = without_repetitions(text)
        assert len(pieces) > 2
        assert all(piece.endswith(ends) for piece in pieces[:-1])


@pytest.mark.parametrize("make", [lambda n: join(words(n // 6)), han], ids=["words", "han"])
def test_the_work_grows_no_faster_than_the_text(make):
    def seconds(text):
        begun = time.process_time()
        without_repetitions(text)
        return time.process_time() - begun

    short, long = make(50_000), make(400_000)
    assert min(seconds(long) for _ in range(2)) < 20 * min(seconds(short) for _ in range(3))


def test_sequences_of_a_part_do_not_overlap_and_spread_over_it():
    rows = corpus(search=100).sequences("search", 4, 20)
    assert rows.shape == (4, 20)
    assert rows.dtype == torch.int64
    assert len(rows.unique()) == rows.numel()
    assert rows[:, 0].tolist() == [0, 25, 50, 75]


def test_sequences_of_the_two_parts_share_no_token():
    given = corpus()
    search, heldout = given.sequences("search", 5, 20), given.sequences("heldout", 3, 20)
    assert int(search.max()) < 100 <= int(heldout.min())


def test_a_prefix_stands_before_every_sequence_and_counts_towards_its_length():
    rows = corpus(prefix=(7,)).sequences("heldout", 3, 21)
    assert rows.shape == (3, 21)
    assert rows[:, 0].tolist() == [7, 7, 7]
    assert rows[:, 1].tolist() == [100, 120, 140]


@pytest.mark.parametrize(("prefix", "room"), [((), 5), ((7,), 5), ((7, 8, 9), 5), ((7, 8, 9, 10), 6)])
def test_room_is_what_sequences_can_fill(prefix, room):
    given = corpus(search=100, prefix=prefix)
    assert given.room("search", 20) == room
    assert given.sequences("search", room, 20).shape == (room, 20)
    with pytest.raises(TextError, match=f"the search part of a.txt has 100 tokens, but {room + 1} sequences of 20"):
        given.sequences("search", room + 1, 20)


def test_prompts_have_several_lengths_from_the_search_part():
    prompts = corpus(search=1000).prompts(64)
    assert [len(p) for p in prompts] == [8, 16, 16, 32, 32, 64]
    assert int(torch.cat(prompts).max()) < 1000
    assert len(torch.cat(prompts).unique()) == sum(map(len, prompts))


@pytest.mark.parametrize("content", ["", "   \n\n \n", "word", "one paragraph alone"], ids=repr)
def test_a_text_without_two_parts_is_refused(tmp_path, content):
    (tmp_path / "short.txt").write_text(content)
    with pytest.raises(TextError, match=r"short\.txt has too few words"):
        make_corpus(tmp_path / "short.txt", characters)


def test_a_text_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(TextError, match=r"latin\.txt is not UTF-8: .* at byte 2"):
        read_text(tmp_path / "latin.txt")


@pytest.mark.parametrize(("name", "reason"), [("none.txt", "No such file"), (".", "Is a directory")])
def test_a_text_that_cannot_be_read_is_refused_with_the_reason(tmp_path, name, reason):
    with pytest.raises(TextError, match=reason):
        read_text(tmp_path / name)


def test_line_ends_and_a_byte_order_mark_do_not_change_the_tokens(tmp_path):
    text = text_of(300) + "\n\n" + text_of(60)
    (tmp_path / "unix.txt").write_bytes(text.encode())
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    unix, dos = (make_corpus(tmp_path / name, characters) for name in ("unix.txt", "dos.txt"))
    assert torch.equal(unix.search, dos.search)
    assert torch.equal(unix.heldout, dos.heldout)
    assert len(unix.search) + len(unix.heldout) == len(text_of(300)) - len("\n\n"), "the repetition is gone"


def test_the_identity_of_a_text_changes_with_one_character(tmp_path):
    for name, text in (("a", text_of(300)), ("b", text_of(300) + ".")):
        (tmp_path / name).write_text(text)
    assert make_corpus(tmp_path / "a", characters).sha256 != make_corpus(tmp_path / "b", characters).sha256


@pytest.mark.parametrize("starts_with_bos", [True, False])
def test_only_a_tokenizer_that_starts_every_text_with_bos_gives_a_prefix(tmp_path, starts_with_bos):
    (tmp_path / "a.txt").write_text(text_of(400))
    tokenizer = tiny_tokenizer()
    plain = read_corpus(tokenizer, tmp_path / "a.txt")
    if starts_with_bos:
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    found = read_corpus(tokenizer, tmp_path / "a.txt")
    assert found.prefix == ((tokenizer.bos_token_id,) if starts_with_bos else ())
    assert torch.equal(found.search, plain.search), "the token stands before sequences, not inside the text"
