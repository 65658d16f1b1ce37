"""Repeating the context over the full cache: what entries are given, and that nothing else stays of it."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import EvictionPolicy, ModelError, ModelSpec, PluginError, RaggedStore
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.store import Scoring
from kvpolicy.integrations.transformers.cache import repeat
from tests.cache.play import GROUP, spec_of, tensors
from tests.integrations.ragged_oracle import stepped_logits
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES
from tests.tiny_checkpoint import tiny_tokenizer

GIVEN = []
INSTRUCTION = torch.tensor([7, 8, 9])


@dataclass(frozen=True, slots=True)
class Repeated(EvictionPolicy):
    """Keeps what the repetition attends to, and notes what it is given."""

    requires: ClassVar[frozenset[str]] = frozenset({"repeat_attention", "keys", "positions", "module", "output_weight"})
    repeat_chunk: int = 12
    num_sink_tokens: int = 2

    def score_prompt(self, activations):
        GIVEN.append(activations)
        return activations.repeat_attention.float()


@pytest.fixture(autouse=True)
def forget():
    GIVEN.clear()


@pytest.fixture
def llama():
    return tiny_model("Llama")


def prompted(model, ids, *, mask=None, retention=0.3, min_tokens=8, policy=None, **options):
    cache = kvpolicy.new_cache(
        model, retention=retention, min_tokens=min_tokens, policy=policy or Repeated(), **options
    )
    with torch.no_grad():
        model(ids, attention_mask=mask, **over(cache))
    return cache


def peaks(model, ids, size=12, instruction=INSTRUCTION):
    """[layers][H, n] by the model's own attention over the whole of context, instruction and chunk."""
    spec, found = ModelSpec.from_config(model.config), []
    for begin in range(0, ids.shape[1], size):
        whole = torch.cat([ids, instruction[None], ids[:, begin : begin + size]], 1)
        with torch.no_grad():
            attentions = model(whole, output_attentions=True, use_cache=False).attentions
        for row, layer in enumerate(spec.budgeted_layers):
            given = attentions[layer][0, :, ids.shape[1] :, : ids.shape[1]].amax(1)
            given = given.unflatten(0, (spec.num_kv_heads, -1)).amax(1)
            if begin:
                found[row] = torch.maximum(found[row], given)
            else:
                found.append(given)
    return found


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2Window", "GptOssWindow"])
@pytest.mark.parametrize("size", [12, 2048])
def test_entries_are_given_the_largest_attention_of_the_repetition(name, size):
    model, ids = tiny_model(name, attention="eager"), tiny_ids(40)
    expected = peaks(model, ids, size)
    cache = prompted(model, ids, policy=Repeated(repeat_chunk=size))
    assert not GIVEN and cache.awaits_repeat
    kvpolicy.repeat_context(model, cache, ids, INSTRUCTION)
    assert [x.layer for x in GIVEN] == list(range(cache.spec.num_budgeted_layers)) and not cache.awaits_repeat
    for given, wanted, layer in zip(GIVEN, expected, cache.spec.budgeted_layers, strict=True):
        torch.testing.assert_close(given.repeat_attention[0], wanted, rtol=1e-4, atol=1e-5)
        assert given.positions.tolist() == [[list(range(40))] * cache.spec.num_kv_heads]
        assert given.module is model.model.layers[layer].self_attn
        assert torch.equal(given.output_weight, given.module.o_proj.weight)
        assert not given.supplied().keys() & {"queries", "full_attention"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_stays_of_the_repetition(name):
    """Nothing is evicted, so that every later logit is the stock cache's."""
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(60, batch=2)
    expected = stepped_logits(model, ids, DynamicCache(config=model.config.get_text_config()), [30, 15, *[1] * 15])
    cache = kvpolicy.new_cache(model, retention=0.9, min_tokens=100, policy=Repeated())
    first = stepped_logits(model, ids[:, :45], cache, [30, 15])
    kvpolicy.repeat_context(model, cache, ids[:, :45], INSTRUCTION)
    assert cache.get_seq_length() == 45 and cache.store.seen.tolist() == [45, 45]
    assert torch.equal(cache.lengths, torch.full_like(cache.lengths, 45))
    rest = stepped_logits(model, ids[:, 45:], cache, [1] * 15)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=0, atol=2e-4)
    assert not cache.report().evicted


def test_the_cache_is_as_it_was_if_the_repetition_breaks_off(monkeypatch):
    model, ids = tiny_model("Gemma2Window", attention="eager"), tiny_ids(50)
    cache, other = prompted(model, ids), prompted(model, ids)
    feed, calls = repeat._feed, []

    def breaking(*arguments):
        calls.append(1)
        feed(*arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(repeat, "_feed", breaking)
    with pytest.raises(KeyboardInterrupt):
        kvpolicy.repeat_context(model, cache, ids, INSTRUCTION)
    assert cache.awaits_repeat and cache.get_seq_length() == 50
    for own, untouched in zip(cache.store.layers, other.store.layers, strict=True):
        for name, tensor in untouched.tensors.items():
            assert torch.equal(own.tensors[name], tensor), name
    for own, untouched in zip(cache.stock_layers, other.stock_layers, strict=True):
        assert torch.equal(own.keys, untouched.keys) and own.get_seq_length() == untouched.get_seq_length()
    monkeypatch.setattr(repeat, "_feed", feed)
    for each in (cache, other):
        kvpolicy.repeat_context(model, each, ids, INSTRUCTION)
    assert [torch.cat(cache.store.positions(i)).tolist() for i in range(2)] == [
        torch.cat(other.store.positions(i)).tolist() for i in range(2)
    ]


@pytest.mark.parametrize("counted", ["columns", "tokens"])
def test_a_padded_row_is_given_what_it_is_given_alone(llama, counted):
    """Rows of 2 and of 4 chunks. Without position_ids a model counts columns, generate counts tokens."""
    short, long = tiny_ids(20), tiny_ids(44)
    ids = torch.cat([torch.nn.functional.pad(short, (24, 0)), long])
    mask = (torch.arange(44)[None] >= torch.tensor([24, 0])[:, None]).long()
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, policy=Repeated())
    places = None if counted == "columns" else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        llama(ids, attention_mask=mask, position_ids=places, **over(cache))
    after = None if counted == "columns" else mask.sum(1)
    kvpolicy.repeat_context(llama, cache, ids, INSTRUCTION, attention_mask=mask, next_position=after)
    together = GIVEN[:]
    assert cache.budgeted[0].filled is None
    for row, alone in enumerate((short, long)):
        GIVEN.clear()
        own = prompted(llama, alone)
        kvpolicy.repeat_context(llama, own, alone, INSTRUCTION)
        for layer, (one, both) in enumerate(zip(GIVEN, together, strict=True)):
            got = both.repeat_attention[row, :, -alone.shape[1] :]
            torch.testing.assert_close(got, one.repeat_attention[0], rtol=1e-4, atol=1e-5)
            assert bool((both.positions[row, :, : 44 - alone.shape[1]] == -1).all())
            for head in range(2):
                assert (
                    cache.store.positions(layer)[2 * row + head].tolist() == own.store.positions(layer)[head].tolist()
                )


def test_tokens_behind_the_context_enter_like_decoded_ones(llama):
    ids = tiny_ids(90)
    cache = prompted(llama, ids[:, :60])
    kvpolicy.repeat_context(llama, cache, ids[:, :60], INSTRUCTION)
    held = [[set(p.tolist()) for p in cache.store.positions(layer)] for layer in range(3)]
    scores = [cache.store.layers[layer].arena.padded_scores().clone() for layer in range(3)]
    before = [torch.stack(cache.store.positions(layer)) for layer in range(3)]
    stepped_logits(llama, ids[:, 60:], cache, [10, 20])
    assert len(GIVEN) == 3, "nobody is asked again"
    for layer in range(3):
        for head, now in enumerate(cache.store.positions(layer)):
            best = held[layer][head] - {0, 1}
            order = sorted(best, key=lambda p: float(scores[layer][head, before[layer][head] == p]))
            left = set(now.tolist()) - set(range(60, 90)) - {0, 1}
            assert left == set(order[len(order) - len(left) :]), "of the context, the best stay"
            count = int(cache.capacities[layer, 0, head])
            assert {p for p in now.tolist() if p >= 60} == set(range(max(60, 90 - count + 2), 90))


# --- through kvpolicy.generate


def test_generate_has_the_prompt_repeated_once_and_goes_on(llama):
    tokenizer, ids = tiny_tokenizer(), tiny_ids(60)
    llama.resize_token_embeddings(len(tokenizer))
    cache, own = (kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, policy=Repeated()) for _ in range(2))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answer = kvpolicy.generate(llama, cache, ids, tokenizer=tokenizer, **options)
    assert len(GIVEN) == 3 and cache.get_seq_length() == 65
    assert int(cache.lengths.sum()) <= round(0.3 * 65 * 6)
    with torch.no_grad():
        token = llama(ids, **over(own)).logits[:, -1:].argmax(-1)
        kvpolicy.repeat_context(llama, own, ids, tokenizer)
        for step in range(6):
            assert token.item() == answer[0, 60 + step]
            token = llama(token, **over(own)).logits[:, -1:].argmax(-1)
    assert kvpolicy.generate(llama, cache, tiny_ids(5), **options).shape == (1, 11)
    assert len(GIVEN) == 6, "the prompts of two caches"


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"prefill_chunk_size": 7}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_every_way_of_generating_enforces_the_budget(llama, mode):
    tokenizer, ids = tiny_tokenizer(), tiny_ids(60, batch=2)
    llama.resize_token_embeddings(len(tokenizer))
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, policy=Repeated())
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    kvpolicy.generate(llama, cache, ids, tokenizer=tokenizer, **{**options, **mode})
    assert len(GIVEN) == 3 and not cache.awaits_repeat
    assert int(cache.lengths[:, 0].sum()) == int(cache.capacities[:, 0].sum()) == round(0.3 * 60 * 6)


def test_a_batch_in_generate_gives_what_each_row_gives_alone(llama):
    tokenizer, short, long = tiny_tokenizer(), tiny_ids(20), tiny_ids(44)
    llama.resize_token_embeddings(len(tokenizer))
    ids = torch.cat([torch.nn.functional.pad(short, (24, 0)), long])
    mask = (torch.arange(44)[None] >= torch.tensor([24, 0])[:, None]).long()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run(rows, row_mask):
        cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=4, policy=Repeated())
        return kvpolicy.generate(llama, cache, rows, row_mask, tokenizer=tokenizer, **options)[:, -8:]

    assert torch.equal(run(ids, mask), torch.cat([run(each, torch.ones_like(each)) for each in (short, long)]))


def test_nothing_is_repeated_where_nothing_is_ever_evicted(llama):
    ids, options = tiny_ids(30), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cache = kvpolicy.new_cache(llama, retention=1.0, policy=Repeated())
    assert not cache.awaits_repeat
    expected = llama.generate(ids, **over(DynamicCache(config=llama.config)), **options)
    assert torch.equal(kvpolicy.generate(llama, cache, ids, **options), expected) and not GIVEN


def test_a_cache_that_waits_can_be_saved(llama, tmp_path):
    kvpolicy_cache = prompted(llama, tiny_ids(40), policy="kvzip")
    kvpolicy_cache.save(tmp_path / "waiting")
    loaded = kvpolicy.load_cache(llama, tmp_path / "waiting")
    for cache in (kvpolicy_cache, loaded):
        assert cache.awaits_repeat
        kvpolicy.repeat_context(llama, cache, tiny_ids(40), INSTRUCTION)
    assert torch.equal(torch.cat(loaded.store.positions(1)), torch.cat(kvpolicy_cache.store.positions(1)))


# --- what is fed


def test_the_instruction_of_a_tokenizer():
    tokenizer = tiny_tokenizer()
    row = torch.arange(30)
    own = repeat._instruction(tokenizer)
    first, second, third = (pieces[0] for pieces in repeat._chunks([row], 12, own))
    assert tokenizer.decode(first[:-12]) == "\n\nRepeat the previous context exactly.\n"
    later = tokenizer("\n\nRepeat the part of the previous context exactly, starting with").input_ids
    line = tokenizer("\n").input_ids
    assert second.tolist() == [*later, *range(4, 12), *line, *range(12, 24)]
    assert third.tolist() == [*later, *range(16, 24), *line, *range(24, 30)]
    assert first[-12:].tolist() == list(range(12))


def test_the_instruction_ends_as_the_chat_template_does():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert tokenizer.decode(repeat._instruction(tokenizer).answer) == "</user><assistant>"


def test_rows_that_have_been_repeated_are_fed_nothing():
    pieces = list(repeat._chunks([torch.arange(5), torch.arange(9)], 5, repeat._instruction(INSTRUCTION)))
    assert [[row.tolist() for row in each] for each in pieces] == [
        [[7, 8, 9, 0, 1, 2, 3, 4], [7, 8, 9, 0, 1, 2, 3, 4]],
        [[], [7, 8, 9, 5, 6, 7, 8]],
    ]


# --- what is refused


WAITS = "this cache still holds every token, as its policy requires repeat_attention"


def test_stock_generate_is_refused_at_its_first_step(llama):
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, policy=Repeated())
    with pytest.raises(ModelError, match=f"{WAITS}.*kvpolicy.repeat_context"):
        llama.generate(tiny_ids(40), **over(cache), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert cache.awaits_repeat and cache.get_seq_length() == 40
    kvpolicy.repeat_context(llama, cache, tiny_ids(40), INSTRUCTION)  # and nothing is lost
    stepped_logits(llama, tiny_ids(2), cache, [1, 1])


@pytest.mark.parametrize("what", ["lengths", "capacities", "nbytes", "report"])
def test_a_cache_that_waits_says_so(llama, what):
    cache = prompted(llama, tiny_ids(40))
    with pytest.raises(ModelError, match=WAITS):
        cache.report() if what == "report" else getattr(cache, what)


def test_assisted_generation_comes_after_the_repetition(llama):
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, policy=Repeated())
    with pytest.raises(ModelError, match=WAITS):
        kvpolicy.generate(llama, cache, tiny_ids(40), tokenizer=tiny_tokenizer(), **options)
    cache = prompted(llama, tiny_ids(40))
    kvpolicy.repeat_context(llama, cache, tiny_ids(40), INSTRUCTION)
    kvpolicy.generate(llama, cache, tiny_ids(9), **options)
    assert bool((cache.lengths <= cache.capacities + 64).all())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "pass tokenizer= to kvpolicy.generate"),
        ({"tokenizer": "tiny", "prefill_chunk_size": 13}, "prefill_chunk_size=13 leaves one token of 40 alone"),
        ({"tokenizer": "tiny"}, "must be the model's tokenizer or int64 .k., got str"),
    ],
)
def test_generate_refuses(llama, given, said):
    cache = kvpolicy.new_cache(llama, retention=0.3, min_tokens=8, policy=Repeated())
    with pytest.raises(ModelError, match=said):
        kvpolicy.generate(llama, cache, tiny_ids(40), max_new_tokens=4, do_sample=False, **given)


def test_generate_refuses_tokens_that_it_does_not_know(llama):
    cache = prompted(llama, tiny_ids(40))
    with pytest.raises(ModelError, match="seen 40 tokens that nobody has repeated"):
        kvpolicy.generate(llama, cache, tiny_ids(4), tokenizer=tiny_tokenizer(), max_new_tokens=4)


@pytest.mark.parametrize(
    ("ids", "instruction", "more", "said"),
    [
        (tiny_ids(40, batch=2), INSTRUCTION, {}, r"holds 1 sequences: expected context_ids \[1, n\].*got \[2, 40\]"),
        (tiny_ids(40)[0], INSTRUCTION, {}, r"got torch.int64 \[40\]: one sequence is ids\[None\]"),
        (tiny_ids(40), INSTRUCTION, {"attention_mask": torch.ones(1, 9)}, r"got \[1, 40\] and \[1, 9\]"),
        (tiny_ids(40)[:, :0], INSTRUCTION, {}, r"at least one of each; got torch.int64 \[1, 0\]"),
        (tiny_ids(40), INSTRUCTION.float(), {}, r"must be int64 \[k\] with k >= 1, got torch.float32 \[3\]"),
        (tiny_ids(40), INSTRUCTION[:0], {}, r"got torch.int64 \[0\]"),
        (tiny_ids(40), "Repeat", {}, "got str"),
        (tiny_ids(40), INSTRUCTION, {"next_position": torch.tensor([1, 2])}, r"next_position \[1\], got \[2\]"),
    ],
)
def test_repeat_context_refuses_what_does_not_fit(llama, ids, instruction, more, said):
    cache = prompted(llama, tiny_ids(40))
    with pytest.raises(ModelError, match=said):
        kvpolicy.repeat_context(llama, cache, ids, instruction, **more)
    assert cache.awaits_repeat


def test_repeat_context_refuses_a_cache_that_does_not_wait(llama):
    ids = tiny_ids(40)
    repeated = prompted(llama, ids)
    kvpolicy.repeat_context(llama, repeated, ids, INSTRUCTION)
    for cache in (repeated, prompted(llama, ids, policy="streaming"), prompted(llama, ids, retention=1.0)):
        with pytest.raises(ModelError, match="waits for no repetition"):
            kvpolicy.repeat_context(llama, cache, ids, INSTRUCTION)
    with pytest.raises(ModelError, match="a prompt comes first"):
        kvpolicy.repeat_context(llama, kvpolicy.new_cache(llama, retention=0.3, policy=Repeated()), ids, INSTRUCTION)


def test_code_that_makes_its_own_cache_is_refused(llama):
    with (
        pytest.raises(ModelError, match=r"Give kvpolicy\.generate a cache with this policy"),
        kvpolicy.attached(llama, retention=0.3, policy=Repeated()),
    ):
        raise AssertionError("never entered")


def test_sources_that_are_gone_by_then_are_refused(llama):
    @dataclass(frozen=True, slots=True)
    class Both(Repeated):
        requires: ClassVar[frozenset[str]] = frozenset({"repeat_attention", "queries", "hidden_before"})

    with pytest.raises(PluginError, match="Both requires repeat_attention and hidden_before, queries: once the"):
        kvpolicy.new_cache(llama, retention=0.3, policy=Both())


def test_a_store_without_transformers_takes_it_from_its_caller():
    policy, table = Repeated(), torch.tensor([[5, 6]])
    with pytest.raises(PluginError, match=r"requires .*repeat_attention.*, which this cache cannot supply"):
        RaggedStore(spec_of(), Fixed(table), policy)
    supplied = {"repeat_attention": torch.rand(1, 2, 20), "module": None, "output_weight": torch.zeros(1)}
    store = RaggedStore(spec_of(), Fixed(table), policy, supplied=frozenset(supplied))
    query, key, value = tensors(20)
    assert query.shape[1] == 2 * GROUP
    chunk = store.arrive(0, key, value)
    with pytest.raises(PluginError, match="give it as extra="):
        store.keep(0, query, copy.copy(chunk), Scoring())
    store.keep(0, query, chunk, Scoring(), extra=supplied)
    for head, count in enumerate((5, 6)):
        best = supplied["repeat_attention"][0, head, 2:].topk(count - 2).indices + 2
        assert sorted(store.positions(0)[head].tolist()) == sorted([0, 1, *best.tolist()])
