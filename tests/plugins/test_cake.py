import math

import pytest
import torch
from kvpolicy_baselines.cake import CAKEAllocator

import kvpolicy
from kvpolicy import Budget, BudgetError, LayerStatistics, PluginError, RaggedStore, registry
from kvpolicy.budget.apportion import apportion
from kvpolicy.cache.lower import lower
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.testing import check_allocator
from tests.cache.play import GROUP, spec_of, tensors
from tests.plugins.direct import after_prompt, ids_of, observed
from tests.tiny import tiny_model

WINDOW = 6
SNAPKV = {"observation_window": WINDOW, "recent_window": WINDOW, "kernel_size": 1}


def statistics_of(attention, window, first=0):
    """(entropy, variance) of one KV head by loops. attention: [GROUP, n, N] of the last n queries over N entries."""
    mean = attention.double().mean(0)[-window:, first : attention.shape[2] - window].tolist()
    entropy = sum(-a * math.log(a) for row in mean for a in row if a > 0) / window
    variance = 0.0
    for column in zip(*mean, strict=True):
        centre = sum(column) / window
        variance += sum((a - centre) ** 2 for a in column) / window
    return entropy, variance


@pytest.mark.parametrize("taus", [(1.0, 1.0), (2.0, 0.5)])
def test_laws(taus):
    check_allocator(CAKEAllocator(*taus))


@pytest.mark.parametrize("taus", [(1.0, 1.0), (2.0, 0.5)])
def test_layers_get_what_their_attention_asks_for(taus):
    ids, retention = ids_of(80), 0.4
    policy = registry.create("policy", "snapkv", SNAPKV)
    cache = after_prompt(ids, policy, retention=retention, allocator=CAKEAllocator(*taus))
    wants = []
    for attention, key in observed(ids):
        group = len(attention) // len(key)
        heads = [statistics_of(attention[h * group : (h + 1) * group], WINDOW) for h in range(len(key))]
        entropy, variance = (sum(values) for values in zip(*heads, strict=True))
        wants.append(entropy ** (1 / taus[0]) * variance ** (1 / taus[1]))
    total = round(retention * 80 * 3 * 2)
    free = total - 3 * 2 * WINDOW
    expected = [WINDOW + free * want / sum(wants) / 2 for want in wants]
    capacities = cache.capacities[:, 0]
    assert int(capacities.sum()) == total
    # earlier layers were split among fewer, and rounding was done each time: within an entry or two
    torch.testing.assert_close(capacities.double().mean(1), torch.tensor(expected).double(), rtol=0, atol=2)
    assert len(set(capacities[:, 0].tolist())) > 1


class Telling(CAKEAllocator):
    told: list = []  # noqa: RUF012

    def split(self, scores, budget, *statistics):
        self.told.append(statistics)
        return super().split(scores, budget, *statistics)


@pytest.fixture(autouse=True)
def forgotten():
    Telling.told.clear()


def store_of(allocator, policy, capacity=12, layers=2, **options):
    spec, schedule = spec_of(layers), Fixed(torch.full((layers, 2), capacity))
    split = RuntimeSplit(allocator, schedule, policy.least_capacity)
    return RaggedStore(spec, schedule, policy, split=split, **options)


@pytest.mark.parametrize("padding", [None, [0, 9]])
def test_statistics_of_a_prompt_and_of_a_later_chunk(padding):
    policy = registry.create("policy", "snapkv", SNAPKV)
    batch = 1 if padding is None else 2
    store, data = store_of(Telling(), policy, batch_size=batch), tensors(30, batch)
    for begin, end in ((0, 24), (24, 28)):
        for layer in range(2):
            positions = [p.tolist() for p in store.positions(layer)] if begin else None
            part = [x[:, :, begin:end] for x in data]
            store.prefill(layer, *part, None if begin else padding)
            for row, told in enumerate(Telling.told[-batch:]):  # sequences are split one by one
                assert len(told) == layer + 1
                for head in range(2):
                    skipped = padding[row] if padding else 0
                    places = list(range(begin, end))
                    if positions is None:
                        places = places[skipped:]
                    else:
                        places = sorted(p + skipped for p in positions[row * 2 + head]) + places
                    window = min(WINDOW, end - begin)
                    query = data[0][row, head * GROUP : (head + 1) * GROUP, end - window : end].double()
                    logits = query @ data[1][row, head, places].double().T * query.shape[-1] ** -0.5
                    hidden = torch.tensor([[p > end - window + i for p in places] for i in range(window)])
                    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)
                    entropy, variance = statistics_of(attention, window)
                    assert float(told[-1].attention_entropy[0, head]) == pytest.approx(entropy, abs=1e-5)
                    assert float(told[-1].attention_variance[0, head]) == pytest.approx(variance, abs=1e-6)


def test_a_padded_row_gets_what_it_gets_alone():
    policy = registry.create("policy", "snapkv", SNAPKV)
    short, long = ids_of(40), ids_of(64)
    ids = torch.cat([torch.nn.functional.pad(short, (24, 0)), long])
    mask = (torch.arange(64)[None] >= torch.tensor([24, 0])[:, None]).long()
    together = after_prompt(ids, policy, mask=mask, retention=0.3, allocator="cake").capacities
    for row, alone in enumerate((short, long)):
        own = after_prompt(alone, policy, retention=0.3, allocator="cake").capacities
        assert torch.equal(together[:, row], own[:, 0])


def test_without_anything_to_compare_layers_get_the_same():
    nothing = LayerStatistics(attention_entropy=torch.zeros(2, 2), attention_variance=torch.zeros(2, 2))
    scores = [torch.rand(2, 2, 9) for _ in range(3)]
    budget = Budget(total=30, shape=(3, 2), floor=1, ceiling=9)
    shares = CAKEAllocator().split(scores, budget, nothing, nothing, nothing)
    assert apportion(shares[0], budget).tolist() == [[5, 5]] * 3


def test_a_statistic_that_nobody_asked_for_is_not_there():
    with pytest.raises(PluginError, match="nobody supplied 'attention_entropy'"):
        _ = LayerStatistics().attention_entropy


def test_it_goes_with_any_policy_that_has_its_attention():
    for name in ("streaming", "h2o", "keydiff"):
        cache = after_prompt(ids_of(80), registry.create("policy", name), retention=0.4, allocator="cake")
        assert int(cache.capacities.sum()) == round(0.4 * 80 * 3 * 2)
    with pytest.raises(PluginError, match="CAKEAllocator requires attention_entropy, attention_variance, and behind"):
        after_prompt(ids_of(80), registry.create("policy", "kvzip"), retention=0.4, allocator="cake")


def test_a_store_whose_prompt_is_over_is_not_split_by_its_attention():
    store = RaggedStore(spec_of(2), Fixed(torch.full((2, 2), 40)), registry.create("policy", "h2o"))
    for layer in range(2):
        store.prefill(layer, *tensors(20))
    with pytest.raises(BudgetError, match="CAKEAllocator requires attention_entropy, attention_variance of the prompt"):
        lower(store, torch.full((2, 2), 10), CAKEAllocator())


@pytest.mark.parametrize("params", [{"tau1": 0.0}, {"tau2": -1.0}])
def test_bad_parameters_are_refused(params):
    with pytest.raises(PluginError, match="cake: tau1 and tau2 must be above 0"):
        registry.create("allocator", "cake", params)


def test_what_an_allocator_requires_is_checked():
    class Wrong(CAKEAllocator):
        requires = frozenset({"keys"})

    with pytest.raises(PluginError, match="`requires` lists 'keys'; the statistics are"):
        kvpolicy.new_cache(tiny_model("Llama"), policy="snapkv", allocator=Wrong(), retention=0.3)
