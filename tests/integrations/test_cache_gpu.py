"""A compressed cache on a GPU, where the kernels are Triton's, does what it does on the CPU."""

import pytest
import torch

import kvpolicy
from kvpolicy import ModelSpec
from tests.cache.policies import HeavyHitter, KeyNorm, LastQueries
from tests.integrations.ragged_oracle import masked_logits, ragged_table, stepped_logits, visible_tokens
from tests.integrations.test_cache import SINKS, STEPS, fixed_cache, within_capacity
from tests.tiny import attention_of, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES, COPYING, COUNTED_IN_PYTHON

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")  # of architectures with layers of other kinds
def test_a_ragged_budget_equals_a_mask_per_head(name):
    model = tiny_model(name, attention=attention_of(name))
    ids = tiny_ids(sum(STEPS), batch=2)
    table = ragged_table(ModelSpec.from_config(model.config), SINKS + 1, 30)
    expected = masked_logits(model, ids, visible_tokens(table, SINKS, STEPS))
    cache = fixed_cache(model.cuda(), table, 64)
    got = stepped_logits(model, ids.cuda(), cache, STEPS, within_capacity)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-4)
    if name in COPYING and cache.replays.mode == "eager":
        assert "Cannot copy between CPU and CUDA" in cache.replays.why
    else:
        assert cache.replays.mode == ("eager" if name in COUNTED_IN_PYTHON else "graph")
    kvpolicy.detach(model)


@pytest.mark.parametrize("policy", [HeavyHitter(), LastQueries(), KeyNorm()], ids=lambda policy: type(policy).__name__)
def test_policies_keep_the_same_entries(policy):
    kept, logits = [], []
    for device in ("cpu", "cuda"):
        model = tiny_model("Llama").to(device)
        cache = kvpolicy.new_cache(model, policy=policy, allocator="uniform", retention=0.3, min_tokens=8)
        logits.append(stepped_logits(model, tiny_ids(sum(STEPS), batch=2).to(device), cache, STEPS).cpu())
        store = cache.opened()
        kept.append([sorted(x.tolist()) for layer in range(len(store.layers)) for x in store.positions(layer)])
        kvpolicy.detach(model)
    assert kept[0] == kept[1]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-4)


def test_the_report_tells_the_first_token_and_the_peak():
    torch.cuda.reset_peak_memory_stats()
    model = tiny_model("Llama").cuda()
    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=8)
    kvpolicy.generate(model, cache, tiny_ids(600).cuda(), max_new_tokens=4)
    report = cache.report()
    assert 0 < report.first_token_seconds < 600
    assert report.peak_nbytes > cache.opened().layers[0].arena.keys.nbytes
    kvpolicy.detach(model)
