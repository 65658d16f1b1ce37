"""Prompts that are no tokens of the model, and chat templates that fail: each is one line that says whose."""

import pytest
import torch

import kvpolicy
from kvpolicy import ModelError, load_model
from kvpolicy.integrations.transformers.model.token_ids import chat_turn
from kvpolicy.integrations.transformers.probes.decode_cost import measure_decode

GOOD = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return load_model(str(tiny_checkpoint))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (
            GOOD[0],
            r"input_ids must be int64 .* got torch.int64 \[40\]: one sequence is ids\[None\]$",
        ),
        (GOOD[:, :0], r"with at least one of each; got torch.int64 \[1, 0\]$"),
        (GOOD[:0], r"got torch.int64 \[0, 40\]$"),
        (GOOD[0, :0], r"got torch.int64 \[0\]$"),
        (GOOD.float(), r"got torch.float32 \[1, 40\]$"),
        (GOOD.tolist(), "got list$"),
        (
            GOOD + 300,
            "holds the token 344, but the model's embeddings are of tokens 0 to 317: this tokenizer",
        ),
        (GOOD - 10, "input_ids holds the token -5,"),
    ],
)
def test_a_prompt_that_is_none(tiny, ids, said):
    model, _ = tiny
    with pytest.raises(ModelError, match=said):
        kvpolicy.generate(model, kvpolicy.new_cache(model, retention=0.5), ids, max_new_tokens=2)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, ids: kvpolicy.TransformersProbe(model, ids),
        lambda model, ids: kvpolicy.TransformersProbe(model, GOOD, [ids[0]]),
        lambda model, ids: kvpolicy.PromptProbe(model, ids, policy=kvpolicy.registry.create("policy", "snapkv")),
        lambda model, ids: measure_decode(model, ids, {}, new_tokens=2),
        lambda model, ids: kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, retention=0.5)).prefill(ids),
    ],
)
def test_tokens_of_another_model(tiny, use):
    with pytest.raises(ModelError, match="the token 344, but the model's embeddings are of tokens 0 to 317"):
        use(tiny[0], GOOD + 300)


STARTED = "{% for m in messages %}[{{ m['role'] }}]"
PARTS = STARTED + "{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (STARTED + "{{ m['content'] | trim }}{% endfor %}>", "[user]gidu>"),
        (PARTS, "[user]gidu>"),
        ("{{ raise_exception('give a system message') }}", "fails: TemplateError: give a system message$"),
        ("{% for m in %}", "fails: TemplateSyntaxError: Expected an expression"),
        ("{{ messages[3].content }}", "fails: UndefinedError"),
        ("", "leaves out what the user says: it gives '' for every prompt$"),
        ("<user>{{ '' }}</user>", "leaves out what the user says: it gives '<user></user>' for every prompt$"),
    ],
)
def test_a_chat_template(tiny_checkpoint, template, said):
    _, tokenizer = load_model(str(tiny_checkpoint))
    tokenizer.chat_template = template
    if said.startswith("["):
        assert chat_turn(tokenizer, "gidu") == said
        return
    with pytest.raises(ModelError, match=said) as caught:
        chat_turn(tokenizer, "gidu")
    assert str(caught.value).startswith(f"the chat template of {tiny_checkpoint} ")
