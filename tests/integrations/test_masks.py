"""Masks hold for tokens that are cached already, in each form: at retention 1 as over a DynamicCache."""

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import ModelError
from tests.tiny import attention_of, over, tiny_ids, tiny_model

LEFT = 6  # padding before the second row's first token
OLD, NEW = 30, 5


def prompt_mask(batch):
    mask = torch.ones(batch, OLD, dtype=torch.int64)
    mask[1:, :LEFT] = 0
    return mask


def hiding(batch, new):
    """Tokens 10 to 19 are hidden from row 0, 15 to 24 from row 1."""
    mask = torch.cat([prompt_mask(batch), torch.ones(batch, new, dtype=torch.int64)], 1)
    mask[0, 10:20] = 0
    mask[1:, 15:25] = 0
    return mask


def dense(mask, new):
    """The same as bool [B, 1, new, columns], causal."""
    columns = mask.shape[1]
    causal = torch.arange(columns)[None] <= torch.arange(columns - new, columns)[:, None]
    return causal[None, None] & mask[:, None, None].bool()


def positions(mask, new):
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]


@torch.no_grad()
def logits(model, cache, form, new, batch=2):
    """Of `new` tokens under a mask that hides some of the prompt's, and of one more that sees all again."""
    ids, mask = tiny_ids(OLD + NEW + 1, batch=batch), prompt_mask(batch)
    model(ids[:, :OLD], attention_mask=mask, position_ids=positions(mask, OLD), **over(cache))
    after = torch.cat([mask, torch.ones(batch, new, dtype=torch.int64)], 1)
    first = model(
        ids[:, OLD : OLD + new],
        attention_mask=form(hiding(batch, new), new),
        position_ids=positions(after, new),
        **over(cache),
    )
    later = torch.cat([after, after[:, -1:]], 1)
    then = model(ids[:, -1:], attention_mask=later, position_ids=positions(later, 1), **over(cache))
    return torch.cat([first.logits, then.logits], 1)


FORMS = {
    "2-D": lambda mask, new: mask,
    "2-D bool": lambda mask, new: mask.bool(),
    "4-D bool": dense,
    "4-D additive": lambda mask, new: torch.zeros(1).masked_fill(~dense(mask, new), torch.finfo(torch.float32).min),
    "dict": lambda mask, new: {"full_attention": dense(mask, new)},
}


@pytest.mark.parametrize("new", [1, NEW])
@pytest.mark.parametrize("form", FORMS)
def test_cached_tokens_can_be_hidden(form, new):
    model = tiny_model("Gemma3" if form == "dict" else "Llama")  # a dict is for models with several kinds of layers
    expected = logits(model, DynamicCache(config=model.config), FORMS[form], new)
    plain = logits(model, DynamicCache(config=model.config), lambda mask, new: after_prompt(mask, new, form), new)
    assert (expected - plain)[:, :new].abs().max() > 0.01, "what is hidden must matter"
    got = logits(model, kvpolicy.new_cache(model, retention=1.0), FORMS[form], new)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def after_prompt(mask, new, form):
    plain = torch.cat([prompt_mask(len(mask)), mask[:, -new:]], 1)
    return {"full_attention": dense(plain, new)} if form == "dict" else plain


@pytest.mark.parametrize("new", [1, NEW])
def test_layers_that_share_keys_hide_them_too(new):
    model = tiny_model("Gemma3n", attention=attention_of("Gemma3n"))
    expected = logits(model, DynamicCache(config=model.config), FORMS["2-D"], new)
    got = logits(model, kvpolicy.new_cache(model, retention=1.0), FORMS["2-D"], new)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def with_holes(model, cache, forms=("2-D", "2-D")):
    """A row that ends, is fed padding, and goes on: columns without a token between those with one."""
    ids, mask, parts = tiny_ids(40, batch=2), prompt_mask(2), []
    begin, fed = 0, (OLD, 1, 2, 1, 3, 1)
    for step, count in enumerate(fed):
        if step:
            new = torch.ones(2, count, dtype=torch.int64)
            new[0] = int(step not in (1, 2))  # padding of row 0
            mask = torch.cat([mask, new], 1)
        given = mask.clone()
        if step >= 4:
            given[:, 20:25] = 0  # and now something is hidden too
        place = positions(mask, count)
        form = FORMS[forms[step % 2]] if step >= 3 else FORMS["2-D"]
        out = model(ids[:, begin : begin + count], attention_mask=form(given, count), position_ids=place, **over(cache))
        parts.append(out.logits[1] if step in (1, 2) else out.logits.flatten(0, 1))
        begin += count
    return torch.cat(parts)


@pytest.mark.parametrize("forms", [("2-D", "2-D"), ("4-D bool", "2-D"), ("4-D bool", "4-D additive")])
def test_padding_between_tokens(forms, tmp_path):
    model = tiny_model("Llama")
    expected = with_holes(model, DynamicCache(config=model.config), forms)
    cache = kvpolicy.new_cache(model, retention=1.0)
    torch.testing.assert_close(with_holes(model, cache, forms), expected, rtol=0, atol=1e-5)
    seen = cache.seen_mask()
    assert seen[0].tolist() == [1] * OLD + [0] * 3 + [1] * 5 and seen[1].tolist() == [0] * LEFT + [1] * 32
    assert cache.report().seen == (35, 32)
    cache.save(tmp_path / "cache.kv")
    assert torch.equal(kvpolicy.load_cache(model, tmp_path / "cache.kv").seen_mask(), seen)


def test_usual_masks_are_read_without_a_look_at_each_column(monkeypatch):
    """Padding at the start of rows alone: two numbers a row say so."""
    from kvpolicy.integrations.transformers.attention import columns

    monkeypatch.setattr(columns, "_read_columns", lambda *_: pytest.fail("the whole mask was copied"))
    model = tiny_model("Llama")
    given = lambda mask, new: torch.cat([prompt_mask(2), mask[:, -new:]], 1)  # noqa: E731
    expected = logits(model, DynamicCache(config=model.config), given, 1)
    got = logits(model, kvpolicy.new_cache(model, retention=1.0), given, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda mask, new: mask[:, -new:], f"attention_mask has {NEW} columns, expected {OLD + NEW}"),
        (lambda mask, new: torch.ones_like(mask), "shows columns that it called padding"),
        (lambda mask, new: dense(mask, new)[..., 1:], "its shape is .*, expected .B, 1, queries, 35."),
        (lambda mask, new: dense(mask, new).expand(-1, 6, -1, -1), "its shape is"),
        (lambda mask, new: torch.full((2, 1, new, OLD + new), 0.5), "it adds a bias"),
    ],
)
def test_what_cannot_be_served_is_refused(form, message):
    model = tiny_model("Llama")
    with pytest.raises(ModelError, match=message):
        logits(model, kvpolicy.new_cache(model, retention=1.0), form, NEW)
