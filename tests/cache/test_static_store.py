"""A store at fixed addresses against the ragged store that it was filled from, token by token."""

import pytest
import torch
from kvpolicy.cache.static import StaticStore, check_static

from kvpolicy import BudgetError
from kvpolicy.cache import static
from kvpolicy.cache.store import Scoring
from tests.cache.play import store_of, tensors
from tests.cache.policies import Coarse, HeavyHitter, KeyNorm, LastQueries, Recent, Repeated, ValueNorm

MOST = 64
POLICIES = [Recent(), Recent(0), ValueNorm(), ValueNorm(0), ValueNorm(recent_window=4), ValueNorm(1, 9), LastQueries()]


class Twins:
    """A ragged store, and a static one that takes its prompts over. Both decode the same tokens."""

    def __init__(self, policy, table, batch=1, spans=(), rows=None):
        self.table, self.spans, self.policy, self.batch = table, spans, policy, batch
        self.data = [tensors(MOST, batch, len(table[0]), seed) for seed in range(len(table))]
        self.ragged = self.empty()
        spanned = self.ragged.protection.num_spanned(MOST) * batch * sum(map(len, table))
        self.static = StaticStore(
            self.ragged.spec,
            batch * sum(map(sum, table)) + spanned if rows is None else rows,
            batch_size=batch,
            num_heads=len(table[0]),
            num_pinned=self.ragged.protection.num_pinned,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    def empty(self):
        return store_of(self.policy, self.table, batch_size=self.batch, protected=self.spans)

    def prompt(self, *counts):
        """One forward of `counts[b]` tokens for each row, padded on the left."""
        self.static.clear()
        for name in ("keys", "values"):
            getattr(self.static, name).fill_(float("nan"))
        self.ragged, self.seen, n = self.empty(), list(counts), max(counts)
        padding = torch.tensor([n - count for count in counts])
        for layer, data in enumerate(self.data):
            rolled = [torch.stack([row.roll(int(p), 1) for row, p in zip(x, padding, strict=True)]) for x in data]
            self.ragged.prefill(layer, *(x[:, :, :n] for x in rolled), num_padding=padding)
            self.static.take(layer, self.ragged.layers[layer], MOST)
        self.static.replan()
        return self.check()

    def decode(self, times):
        for _ in range(times):
            for layer, data in enumerate(self.data):
                rows = torch.tensor(self.seen)[:, None, None, None]
                query, key, value = (x.gather(2, rows.expand(-1, x.shape[1], 1, x.shape[3])) for x in data)
                expected = self.ragged.decode(layer, query, key, value)
                self.static.append(layer, key, value)
                found = self.static.attend(layer, query, Scoring())
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            self.seen = [seen + 1 for seen in self.seen]
            self.check()
        return self

    def check(self):
        assert self.static.seen.tolist() == self.ragged.seen.tolist() == self.seen
        assert torch.equal(self.static.lengths.flatten(), self.ragged.lengths.flatten())
        assert bool((self.static.lengths <= self.static.capacities).all())
        for layer in range(len(self.table)):
            tables = zip(self.static.starts[layer].tolist(), self.static.lengths[layer].tolist(), strict=True)
            kept = [sorted(self.static.positions[start : start + length].tolist()) for start, length in tables]
            assert kept == [sorted(x.tolist()) for x in self.ragged.positions(layer)]
        return self


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("table", [[[6, 11]], [[7, 30], [12, 3], [5, 5]]], ids=str)
def test_decoding(policy, table):
    Twins(policy, table).prompt(20).decode(25)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rows_of_different_length_some_of_which_still_grow(policy):
    Twins(policy, [[6, 24], [30, 9]], batch=3).prompt(20, 7, 26).decode(30)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_one_store_for_prompt_after_prompt(policy):
    Twins(policy, [[6, 24], [30, 9]]).prompt(20).decode(12).prompt(33).decode(20).prompt(3).decode(40)


@pytest.mark.parametrize("policy", [Recent(), ValueNorm(), LastQueries()], ids=str)
@pytest.mark.parametrize("spans", [[(4, 9)], [(0, 6)], [(3, 5), (5, 6), (12, 14)]], ids=str)
def test_protected_spans(policy, spans):
    Twins(policy, [[6, 11]], spans=spans).prompt(20).decode(25)


@pytest.mark.parametrize("seed", range(20))
def test_any_scores_under_any_window(seed):
    """Few distinct scores and a window about as large as the capacity: the order of ties and of freed entries."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    policy = [ValueNorm, LastQueries][seed % 2](num_sink_tokens=draw(0, 3), recent_window=draw(0, 14))
    table = torch.randint(4, 24, (2, 2), generator=generator).tolist()
    Twins(policy, table, batch=2).prompt(draw(4, 30), draw(4, 30)).decode(30)


def test_a_rehearsal_leaves_nothing():
    twins = Twins(LastQueries(), [[6, 11], [8, 8]])
    twins.static.rehearse()
    for _ in range(3):
        for layer in range(2):
            query, key, value = (x[:, :, :1] for x in twins.data[layer])
            twins.static.append(layer, key, value)
            assert twins.static.attend(layer, query, Scoring()).isfinite().all()
    twins.prompt(20).decode(12)


def test_addresses_stay():
    twins = Twins(Recent(), [[6, 11], [8, 8]])
    before = [tensor.data_ptr() for tensor in twins.static.tensors]
    twins.prompt(20).decode(12).prompt(9).decode(3)
    assert [tensor.data_ptr() for tensor in twins.static.tensors] == before


def test_bytes_are_those_of_the_capacities():
    twins = Twins(Recent(), [[600, 1100], [800, 800]])
    entries = 3300 * (8 + 6 + 1) * 4
    assert entries <= twins.static.nbytes <= entries + 2000  # tables


@pytest.mark.parametrize("policy", [HeavyHitter(), KeyNorm(), Coarse()], ids=str)
def test_policies_that_rescore_are_refused(policy):
    with pytest.raises(BudgetError, match=f"{type(policy).__name__} .* static store"):
        check_static(policy)


def test_a_policy_that_has_the_context_repeated_is_refused():
    with pytest.raises(BudgetError, match="Repeated requires repeat_attention: its context is held"):
        check_static(Repeated())


def test_what_does_not_fit_is_refused():
    with pytest.raises(BudgetError, match="layer 0 needs 17 rows, the static store has 16 of 16 left"):
        Twins(Recent(), [[6, 11]], rows=16).prompt(20)
    with pytest.raises(BudgetError, match="protected spans end at token 30, the shortest prompt has 20"):
        Twins(Recent(), [[6, 11]], spans=[(28, 30)]).prompt(20)


def test_layers_out_of_turn_are_refused():
    twins = Twins(Recent(), [[6, 11], [8, 8]])
    (_, key, value), (_, *other) = ([x[:, :, :1] for x in data] for data in twins.data)
    with pytest.raises(BudgetError, match="layer 0 came where no layer's was due: a prompt comes first"):
        twins.static.append(0, key, value)
    twins.prompt(20)
    with pytest.raises(BudgetError, match="layer 1 came where layer 0's was due"):
        twins.static.append(1, *other)
    twins.static.append(0, key, value)
    with pytest.raises(BudgetError, match="layer 0 came where layer 1's was due"):
        twins.static.append(0, key, value)
    twins.prompt(20).decode(3)


def test_an_append_that_broke_off_is_not_the_last_word(monkeypatch):
    twins = Twins(Recent(), [[6, 11]]).prompt(20)
    _, key, value = (x[:, :, :1] for x in twins.data[0])
    with monkeypatch.context() as broken:
        broken.setattr(static, "append_next", None)
        with pytest.raises(TypeError):
            twins.static.append(0, key, value)
    with pytest.raises(BudgetError, match="layer 0 came where no layer's was due"):
        twins.static.append(0, key, value)


def test_a_store_that_lacks_a_layer_is_not_emptied():
    twins = Twins(Recent(), [[6, 11], [8, 8]]).prompt(20)
    ragged = twins.empty()
    ragged.prefill(0, *(x[:, :, :20] for x in twins.data[0]))
    with pytest.raises(BudgetError, match="layer 1 is empty: its prompt comes first"):
        twins.static.fill(ragged, MOST)
    assert ragged.lengths[0].tolist() == [[6, 11]]
    twins.check()
