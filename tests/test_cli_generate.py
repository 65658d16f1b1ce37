"""`kvpolicy generate`: the text of the model, what was kept for it, and every bad input as one line."""

import contextlib
import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy as package
from tests.command_line import KVPOLICY, in_a_process
from tests.tiny_checkpoint import save_tiny_checkpoint, save_tiny_falcon, text_of

PROMPT = " ".join(text_of(60).split())  # about 240 tokens
LAYERS, HEADS, ENTRY = 2, 2, (8 + 8) * 4


@pytest.fixture
def generate(tiny_checkpoint):
    """The arguments of a short answer of the tiny model; later ones win."""
    return ["generate", "--model", tiny_checkpoint, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12"]


def expected_ids(folder, prompt, count, **options):
    """The greedy answer over a cache made by hand, int64 [1, n]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    cache = package.new_cache(model, **options)
    out = package.generate(model, cache, ids, max_new_tokens=count, do_sample=False)
    return out[:, ids.shape[1] :], cache


# --- good paths


def test_the_text_comes_on_standard_output_and_the_figures_on_standard_error(kvpolicy, generate, tiny_checkpoint):
    options = ["--retention", "0.3", "--min-tokens", "16"]
    result = kvpolicy(*generate, "uniform", "--prompt", PROMPT, *options)
    ids, cache = expected_ids(tiny_checkpoint, PROMPT, 12, retention=0.3, min_tokens=16)
    text = AutoTokenizer.from_pretrained(tiny_checkpoint).decode(ids[0], skip_special_tokens=True)
    assert (result.code, result.out) == (0, text + "\n")
    held, seen = int(cache.lengths.sum()), int(cache.store.seen.sum()) * LAYERS * HEADS
    assert held < 0.5 * seen
    assert f"{held} of {seen} entries" in result.err
    assert "nothing was evicted" not in result.err


def test_json_is_one_object_with_measured_figures(kvpolicy, generate, tiny_checkpoint):
    options = ["--retention", "0.3", "--min-tokens", "16", "--json"]
    result = kvpolicy(*generate, "--prompt", PROMPT, *options)
    found = result.json
    assert result.err == ""
    ids, cache = expected_ids(tiny_checkpoint, PROMPT, 12, retention=0.3, min_tokens=16)
    assert (found["plan"], found["retention"], found["policy"], found["chat"]) == ("uniform", 0.3, "streaming", False)
    assert found["text"] == AutoTokenizer.from_pretrained(tiny_checkpoint).decode(ids[0], skip_special_tokens=True)
    assert found["new_tokens"] == ids.shape[1]
    seen = found["prompt_tokens"] + found["new_tokens"] - 1  # nobody has fed the last one
    assert found["entries_seen"] == seen * LAYERS * HEADS
    assert found["entries"] == int(cache.lengths.sum())
    assert found["kept"] == found["entries"] / found["entries_seen"]
    assert found["evicted"] is True
    assert found["bytes"] == cache.nbytes >= found["entries"] * ENTRY
    assert found["dense_bytes"] == found["entries_seen"] * ENTRY
    assert found["prefill_tokens_per_second"] == found["prompt_tokens"] / found["prefill_seconds"]
    assert found["decode_tokens_per_second"] == (found["new_tokens"] - 1) / found["decode_seconds"]


def test_bytes_and_a_format_of_the_entries(kvpolicy, generate, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model", head_dim=16)
    options = ["--model", folder, "--prompt", PROMPT, "--json", "--policy", "snapkv"]
    sizes = {}
    for name in ("model", "int8", "int4"):
        found = kvpolicy(*generate, "uniform", "--memory", "50kB", "--format", name, *options).json
        assert (found["format"], found["memory"]) == (name, "50kB")
        assert found["bytes"] <= 50_000
        sizes[name] = found["entries"]
    assert sizes["model"] < sizes["int8"] / 2 < sizes["int4"]


def test_full_is_the_model_itself(kvpolicy, generate, tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    given = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given.input_ids.shape[1] :]
    found = kvpolicy(*generate, "full", "--prompt", PROMPT, "--json").json
    assert found["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert (found["kept"], found["evicted"], found["retention"]) == (1.0, False, None)
    assert "nothing was evicted\n" in kvpolicy(*generate, "full", "--prompt", PROMPT).err


def test_a_short_prompt_is_kept_whole_and_said_to_be(kvpolicy, generate):
    result = kvpolicy(*generate, "--prompt", "bada gidu", "--retention", "0.1")
    assert "nothing was evicted: 128 entries of each KV head are kept in any case (--min-tokens)" in result.err


def test_a_plan_brings_its_model_and_its_highest_level(kvpolicy, tuned):
    path, _ = tuned
    options = ["--prompt", PROMPT, "--device", "cpu", "--max-new-tokens", "4", "--min-tokens", "16", "--json"]
    found = kvpolicy("generate", path, *options).json
    assert found["model"] == package.load_plan(path).model.id
    assert found["retention"] == 0.5
    lower = kvpolicy("generate", path, "--retention", "0.3", *options).json
    assert lower["entries"] == round(0.3 * lower["prompt_tokens"] * LAYERS * HEADS)
    tokens = kvpolicy("generate", path, "--tokens", "20", *options)
    assert tokens.json["entries"] == 20 * LAYERS * HEADS
    assert (tokens.json["retention"], tokens.json["tokens"]) == (None, 20)


@pytest.mark.parametrize("allocator", ["uniform", "adakv"])
def test_a_policy_that_has_the_context_repeated(kvpolicy, generate, tiny_checkpoint, allocator):
    options = ["--retention", "0.3", "--min-tokens", "16", "--policy", "kvzip", "--allocator", allocator, "--json"]
    found = kvpolicy(*generate, "--prompt", PROMPT, *options).json
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    cache = package.new_cache(model, policy="kvzip", allocator=allocator, retention=0.3, min_tokens=16)
    out = package.generate(model, cache, ids, tokenizer=tokenizer, max_new_tokens=12, do_sample=False)
    assert found["text"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert (found["policy"], found["evicted"], found["entries"]) == ("kvzip", True, int(cache.lengths.sum()))
    assert found["entries_seen"] == (found["prompt_tokens"] + found["new_tokens"] - 1) * LAYERS * HEADS


def test_the_prompt_of_a_file_and_of_standard_input(kvpolicy, generate, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    as_option = kvpolicy(*generate, "full", "--prompt", PROMPT).out
    assert kvpolicy(*generate, "full", "--prompt-file", tmp_path / "prompt.txt").out == as_option
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert kvpolicy(*generate, "full", "--prompt-file", "-").out == as_option


def test_more_tokens_than_the_model_was_made_for_are_said(kvpolicy, generate):
    said = "tokens with the answer are more than the 256 that the model was made for"
    assert said not in kvpolicy(*generate, "full", "--prompt", "bada gidu").err
    assert said in kvpolicy(*generate, "full", "--prompt", PROMPT).err


def test_quiet_prints_the_text_alone(kvpolicy, generate):
    result = kvpolicy(*generate, "full", "--prompt", PROMPT, "--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.out.strip()


def test_a_chat_template_is_used_unless_it_is_refused(kvpolicy, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} bada:"
    tokenizer.save_pretrained(folder)
    options = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "4", "--json"]
    chat = kvpolicy("generate", "full", "--prompt", "gidu", *options).json
    plain = kvpolicy("generate", "full", "--prompt", "<s>[user] gidu bada:", "--no-chat", *options).json
    assert (chat["chat"], plain["chat"]) == (True, False)
    assert chat["prompt_tokens"] == plain["prompt_tokens"] == len(tokenizer("<s>[user] gidu bada:").input_ids)
    assert chat["text"] == plain["text"]


def test_a_temperature_samples_by_the_seed(kvpolicy, generate):
    def text(*options):
        return kvpolicy(*generate, "full", "--prompt", PROMPT, "--temperature", "1.5", "--json", *options).json["text"]

    assert text("--seed", "1") == text("--seed", "1")
    assert len({text("--seed", str(seed)) for seed in range(3)}) > 1


def test_a_character_is_printed_once_it_is_whole(capfd):
    """A byte-level tokenizer may cut a character into several tokens."""
    from kvpolicy.cli.generate import _Stream
    from tests.tiny_checkpoint import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    text = "bada \u20ac\U0001f600 gidu"
    stream = _Stream(tokenizer, silent=False, reading=contextlib.ExitStack())
    stream.put(torch.tensor([[0]]))
    shown = []
    for token in tokenizer(text).input_ids:
        stream.put(torch.tensor([token]))
        shown.append(capfd.readouterr().out)
    stream.end()
    assert "".join(shown) == text == stream.text
    assert "\u20ac" in shown and "" in shown
    assert capfd.readouterr().out == "\n"


# --- bad input

WRONG = {
    "": "give a prompt: either --prompt or --prompt-file",
    "--prompt a --prompt-file b": "give a prompt: either --prompt or --prompt-file",
    "--prompt-file nowhere.txt": "cannot read the prompt nowhere.txt: No such file or directory",
    "--prompt a": "generate uniform needs --retention",
    "--prompt a --retention 0": "--retention is the fraction that is kept, in (0, 1]; got 0",
    "--prompt a --retention nan": "got nan",
    "--prompt a --tokens 20": "--tokens needs a plan file; uniform takes --retention",
    "full --prompt a --retention 0.3": "full keeps everything; leave --retention out",
    "full --prompt a --allocator uniform": "--allocator goes with uniform: full leaves nothing to be split",
    "--prompt a -r 0.3 --policy steaming": "no policy named 'steaming' (did you mean 'streaming'?)",
    "--prompt a -r 0.3 --allocator unifrom": "no allocator named 'unifrom' (did you mean 'uniform'?)",
    "--prompt a -r 0.3 --allocator baklava": "run 'kvpolicy tune' with it and give the plan",
    "--prompt a -r 0.3 --max-new-tokens 0": "Invalid value for '--max-new-tokens'",
    "--prompt a -r 0.3 --temperature -1": "Invalid value for '--temperature'",
    "--prompt a -r 0.3 --memory 0.3": "--memory goes with a plan or uniform, without --retention and --tokens",
    "--prompt a --memory much": "'much' is no size",
    "--prompt a -r 0.3 --format int3": "--format must be one of model, int8, int4, think, got 'int3'",
    "nowhere.json --prompt a": "plan file 'nowhere.json': cannot be read: No such file or directory",
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.items(), ids=WRONG)
def test_a_wrong_option(refused, generate, arguments, expected):
    assert expected in refused(*generate, *arguments.split())


def test_a_prompt_of_nothing(refused, generate):
    assert "the prompt is empty" in refused(*generate, "full", "--prompt", " ")


def test_a_prompt_that_is_no_text(refused, generate, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"na\xefve")
    line = refused(*generate, "full", "--prompt-file", tmp_path / "prompt.txt")
    assert "prompt.txt is not UTF-8" in line


def test_a_plan_that_cannot_be_run(refused, generate, tuned, tmp_path):
    path, _ = tuned
    document = json.loads(path.read_text())
    document["levels"][0]["shares"][0][1] = -1
    (tmp_path / "bad.json").write_text(json.dumps(document))
    assert "levels[0].shares[0][1]" in refused(*generate, tmp_path / "bad.json", "--prompt", "a")
    line = refused(*generate, path, "--prompt", "a", "--retention", "0.1")
    assert "retention 0.1 is below the plan's lowest level; it has 0.3, 0.5" in line
    assert "give one" in refused(*generate, path, "--prompt", "a", "--retention", "0.3", "--tokens", "9")
    other = save_tiny_checkpoint(tmp_path / "other", layers=3)
    assert "made for another model" in refused(*generate, path, "--prompt", "a", "--model", other)


def test_a_model_whose_attention_cannot_be_exchanged(refused, tmp_path):
    falcon = save_tiny_falcon(tmp_path / "falcon")
    assert "Falcon" in refused("generate", "--model", falcon, "--prompt", "a", "--retention", "0.3")


def test_an_error_in_a_process_of_its_own_is_one_line(generate):
    result = in_a_process(*generate, "--prompt", "a")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == result.errors


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_the_text_so_far(generate):
    command = [*KVPOLICY, *map(str, generate), "full", "--prompt", PROMPT, "--max-new-tokens", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.read(5)  # it has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert len(first) == 5 and out.endswith("\n")
    assert err.splitlines()[-1] == "kvpolicy: interrupted"
    assert "Traceback" not in err
