"""Contexts that are compressed before the harness scores what follows: against dense forwards, and under a budget.

The harness is 60 packages, so that CI goes without it: its interface stands in here, as far as it is used. Where it is
installed, its own `hf` is compared with too.
"""

import importlib.util
import json
import sys
import types
from functools import partial

import pytest
import torch

import kvpolicy
from kvpolicy import new_cache, registry
from kvpolicy.integrations.lm_eval.continuations import CHUNK, ContinuationScorer
from kvpolicy.integrations.transformers import attached, prompt_cache, with_cache
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_checkpoint import tiny_tokenizer

IDS = tiny_ids(80)[0].tolist()
CONTEXT, CONTINUATIONS = IDS[:60], [IDS[60:66], IDS[70:71], IDS[61:64]]
WHOLE_BUT_READ_APART = {"retention": 0.5, "min_tokens": 4096}  # shorter texts stay whole under this budget
INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama")


def scorer(model, **options):
    """Over caches that keep everything, in one forward, but for other options."""
    budget = {"retention": 1.0, "policy": "snapkv", "min_tokens": 1, "decode": "append"} | options
    return ContinuationScorer(model, tiny_tokenizer(), partial(new_cache, model, **budget))


def dense(model, context, tokens):
    """The log-likelihood of each token, by one plain forward."""
    kvpolicy.detach(model)
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tokens][:-1]])).logits[0, len(context) - 1 :]
    return torch.log_softmax(logits, -1)[range(len(tokens)), tokens], logits.argmax(-1)


@pytest.mark.parametrize("options", [{}, WHOLE_BUT_READ_APART], ids=["one forward", "apart"])
def test_all_kept_gives_the_likelihoods_of_plain_forwards(model, options):
    greedy = dense(model, CONTEXT, [0])[1].tolist()
    continuations = [*CONTINUATIONS, [*CONTINUATIONS[0][:-1], 7], greedy]
    found = scorer(model, **options).behind(CONTEXT, continuations)
    for (total, is_greedy), tokens in zip(found, continuations, strict=True):
        each, likeliest = dense(model, CONTEXT, tokens)
        assert total == (pytest.approx(float(each.sum()), rel=1e-5) if options else float(each.sum()))
        assert is_greedy == (likeliest.tolist() == list(tokens))
    assert found[-1][1]


def test_with_all_kept_continuations_that_differ_in_the_last_token_share_a_forward(model, monkeypatch):
    subject, fed = scorer(model), []
    plain = subject._plain
    monkeypatch.setattr(subject, "_plain", lambda ids: fed.append(len(ids)) or plain(ids))
    subject.behind(CONTEXT, [[3], [4], [3, 5], [3, 6], [4, 6]])
    assert fed == [60, 61, 61]


def test_entries_of_fewer_bits_are_not_read_in_one_forward(model):
    assert scorer(model).keeps_all
    assert not scorer(model, format="int8").keeps_all
    assert not scorer(model, retention=0.5).keeps_all


def test_a_continuation_is_scored_as_if_token_by_token_behind_the_compressed_context(model):
    found = scorer(model, retention=0.4).behind(CONTEXT, CONTINUATIONS)
    assert found != scorer(model).behind(CONTEXT, CONTINUATIONS)
    for (total, _), tokens in zip(found, CONTINUATIONS, strict=True):
        with torch.no_grad(), attached(model):
            cache = prompt_cache(model, registry.create("policy", "snapkv"), torch.full((3, 2), 24))
            logits, each = model(torch.tensor([CONTEXT]), **with_cache(model, cache)).logits, []
            for token in tokens:
                each.append(float(torch.log_softmax(logits[0, -1], -1)[token]))
                logits = model(torch.tensor([[token]]), **with_cache(model, cache)).logits
        assert total == pytest.approx(sum(each), rel=1e-5)


@pytest.mark.parametrize("length", [2, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("context", [1, 5])
@pytest.mark.parametrize("options", [{}, WHOLE_BUT_READ_APART], ids=["one forward", "chunks"])
def test_a_streaming_text_with_all_kept_is_that_of_one_forward(model, length, context, options):
    ids = tiny_ids(length + context)[0].tolist()
    found = scorer(model, **options).streaming(ids[:context], ids[context:])
    whole = float(dense(model, ids[:context], ids[context:])[0].sum())
    assert found == (pytest.approx(whole, rel=1e-5) if options else whole)


def test_a_streaming_text_under_a_budget_sees_what_was_kept_of_earlier_chunks(model):
    ids = tiny_ids(3 * CHUNK)[0].tolist()
    some = scorer(model, retention=0.3, policy="streaming").streaming(ids[:1], ids[1:])
    whole = scorer(model).streaming(ids[:1], ids[1:])
    short = scorer(model, retention=0.3, policy="streaming").streaming(ids[:1], ids[1:CHUNK])
    assert abs(some - whole) > 1e-3
    assert short == pytest.approx(scorer(model).streaming(ids[:1], ids[1:CHUNK]), rel=1e-6), "one chunk sees itself"


def test_a_policy_that_repeats_contexts_does(model):
    model = tiny_model("Llama", vocab_size=len(tiny_tokenizer()))
    found = scorer(model, retention=0.4, policy="kvzip").behind(CONTEXT, CONTINUATIONS)
    assert len(found) == 3 and all(total < 0 for total, _ in found)


# --- the model class, over a stand-in for the harness


class Hook:
    def __init__(self):
        self.known = []

    def add_partial(self, kind, request, answer):
        self.known.append((kind, request, answer))


class HFLM:
    """What `PolicyLM` uses of lm_eval.models.huggingface.HFLM."""

    max_length = 70

    def __init__(self, pretrained, tokenizer, batch_size, max_length):
        self.model, self.tokenizer, self.batch_size, self.cache_hook = pretrained, tokenizer, batch_size, Hook()
        self.max_length = max_length or self.max_length
        self.prefix_token_id = 1

    def tok_encode(self, text):
        return [int(word) for word in text.split()]

    def _model_generate(self, context, max_length, stop, **options):
        greedy = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        return self.model.generate(input_ids=context, max_length=max_length, **greedy, **options)


def rolling_windows(token_list, prefix_token, max_seq_len, context_len):
    """Of lm_eval.utils, for a context of one token."""
    windows, begin = [([prefix_token], token_list[:max_seq_len])], max_seq_len
    while begin < len(token_list):
        windows.append((token_list[begin - 1 : begin], token_list[begin : begin + max_seq_len]))
        begin += max_seq_len
    return windows


@pytest.fixture
def harness(monkeypatch):
    """The stand-in, in the place of lm_eval; gives what `simple_evaluate` was asked."""
    asked = []

    def simple_evaluate(**options):
        asked.append(options)
        return {"results": {"mine": {"acc,none": 0.5, "alias": "mine"}}, "n-samples": {"mine": {"effective": 4}}}

    class TaskManager:
        def __init__(self, include_path):
            self.all_tasks = ["mine"]

    contents = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__spec__": importlib.util.spec_from_loader("lm_eval", None)},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.utils": {"get_rolling_token_windows": rolling_windows, "make_disjoint_window": lambda window: window},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.import_module("kvpolicy.verbs.lm_harness"), "version", lambda package: "0")
    for name in ("policy_lm", "harness_run"):
        monkeypatch.delitem(sys.modules, f"kvpolicy.integrations.lm_eval.{name}", raising=False)
    yield asked
    for name in ("policy_lm", "harness_run"):  # whoever has the real one makes these again
        sys.modules.pop(f"kvpolicy.integrations.lm_eval.{name}", None)


def policy_lm(model, tokenizer=None, **options):
    from kvpolicy.integrations.lm_eval.policy_lm import PolicyLM

    options = {"retention": 1.0, "policy": "snapkv", "min_tokens": 1} | options
    return PolicyLM(model, tokenizer or tiny_tokenizer(), **options)


def test_requests_of_one_context_share_it_and_keep_their_order(harness, model, monkeypatch):
    lm, contexts = policy_lm(model), [CONTEXT, IDS[5:40]]
    requests = [(str(i), contexts[i % 2], CONTINUATIONS[i % 3]) for i in range(6)]
    asked, behind = [], lm.scorer.behind
    monkeypatch.setattr(lm.scorer, "behind", lambda *given: asked.append(given) or behind(*given))
    found = lm._loglikelihood_tokens(requests)
    assert [len(continuations) for _, continuations in asked] == [3, 3]
    for (_, context, tokens), (total, _) in zip(requests, found, strict=True):
        assert total == pytest.approx(float(dense(model, context, tokens)[0].sum()), rel=1e-5)
    assert sorted(lm.cache_hook.known) == [("loglikelihood", str(i), found[i]) for i in range(6)]


def test_what_is_too_long_loses_its_beginning(harness, model):
    lm = policy_lm(model, max_length=20)
    ((total, _),) = lm._loglikelihood_tokens([("x", CONTEXT, CONTINUATIONS[0])])
    assert total == pytest.approx(float(dense(model, CONTEXT[-15:], CONTINUATIONS[0])[0].sum()), rel=1e-5)


def test_rolling_reads_each_window_and_adds_up(harness, model):
    lm, ids = policy_lm(model, max_length=50), tiny_ids(90)[0].tolist()
    request = types.SimpleNamespace(args=(" ".join(map(str, ids)),))
    (found,) = lm.loglikelihood_rolling([request])
    parts = [dense(model, [1], ids[:50])[0], dense(model, ids[49:50], ids[50:])[0]]
    assert found == pytest.approx(float(torch.cat(parts).sum()), rel=1e-5)
    assert lm.cache_hook.known[0][0] == "loglikelihood_rolling"


def test_generation_runs_over_the_budget_and_with_all_kept_as_without(harness, model):
    ids = tiny_ids(60, 2)
    kvpolicy.detach(model)
    plain = model.generate(ids, max_length=72, do_sample=False, pad_token_id=0)
    same = policy_lm(model)._model_generate(ids, max_length=72, stop=[])
    other = policy_lm(model, retention=0.2)._model_generate(ids, max_length=72, stop=[])
    assert torch.equal(plain, same) and not torch.equal(plain, other)
    with pytest.raises(kvpolicy.ModelError, match="requires repeat_attention"):
        policy_lm(model, retention=0.2, policy="kvzip")._model_generate(ids, max_length=72, stop=[])


# --- the verb


def test_the_verb_hands_tasks_to_the_harness(harness, kvpolicy, tiny_checkpoint, tmp_path):
    command = ["lm-eval", "uniform", "--tasks", "mine", "--retention", 0.5, "--policy", "snapkv", "--limit", 4]
    command += ["--model", tiny_checkpoint, "--dtype", "float32", "--include-path", tmp_path]
    result = kvpolicy(*command, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["results"] == {"mine": {"acc,none": 0.5, "alias": "mine", "n": 4}}
    assert (document["retention"], document["policy"], document["limit"]) == (0.5, "snapkv", 4)
    assert harness[0]["tasks"] == ["mine"] and harness[0]["limit"] == 4
    assert "acc,none" in kvpolicy(*command).out
    other = kvpolicy(*command, "--tasks", "theirs")
    assert other.code == 2 and "lm-eval has no task theirs" in other.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["full"], "name the tasks to run: --tasks"),
        (["uniform", "--tasks", "x"], "lm-eval uniform needs --retention"),
        (["full", "--tasks", "x", "--include-path", "nowhere"], "--include-path nowhere is no directory"),
        (["full", "--tasks", "x", "--retention", 0.5], "full keeps everything"),
    ],
)
def test_the_verb_refuses_before_a_model_is_loaded(refused, arguments, expected):
    assert expected in refused("lm-eval", *arguments)


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_the_verb_says_what_to_install(refused):
    assert "pip install 'kvpolicy[lm-eval]'" in refused("lm-eval", "full", "--tasks", "x")


# --- the harness itself


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed: pip install 'kvpolicy[lm-eval]'")
@pytest.mark.filterwarnings("ignore")
def test_at_full_budget_it_is_the_harness_own_model(smollm2, tmp_path):
    from lm_eval.models.huggingface import HFLM

    from kvpolicy.integrations.lm_eval.harness_run import run_tasks

    tasks = write_tasks(tmp_path)
    model, tokenizer = smollm2
    own = run_tasks(HFLM(pretrained=model, tokenizer=tokenizer), tasks, include=tmp_path)
    full, some = (
        run_tasks(policy_lm(model, tokenizer, retention=kept), tasks, include=tmp_path) for kept in (1.0, 0.3)
    )
    changed = []
    for task in tasks:
        figures = {name: value for name, value in own[task].items() if isinstance(value, float)}
        assert {name: full[task][name] for name in figures} == figures, "to the last digit"
        changed += [task] if {name: some[task][name] for name in figures} != pytest.approx(figures, rel=1e-3) else []
    assert "kvpolicy_rolling" in changed  # a choice may still be right


def write_tasks(folder):
    """Three tasks over one local file: a choice, a generation, and a rolling log-likelihood."""
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    rows = []
    for index in range(6):
        number, wrong = str(12345 + 7919 * index), [str(54321 + 1013 * index), str(33333 + 17 * index)]
        text = f"{filler * (3 + index)}The pass key is {number}. {filler * 4}"
        rows.append({"context": text, "answer": number, "choices": [*wrong, number], "gold": 2})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\ntest_split: test\n"
    asked = 'doc_to_text: "{{context}}\\nThe pass key is"\n'
    bodies = {
        "choice": f'output_type: multiple_choice\n{asked}doc_to_choice: "{{{{choices}}}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n",
        "generate": f'output_type: generate_until\n{asked}doc_to_target: " {{{{answer}}}}"\ngeneration_kwargs:\n'
        '  until: ["."]\n  max_gen_toks: 8\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n',
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{context}}"\n'
        "metric_list:\n  - metric: word_perplexity\n",
    }
    for name, body in bodies.items():
        (folder / f"{name}.yaml").write_text(f"task: kvpolicy_{name}\n{head}{body}")
    return [f"kvpolicy_{name}" for name in bodies]
