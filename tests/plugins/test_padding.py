"""A padded row keeps what it keeps alone, under every method."""

import pytest
import torch

import kvpolicy
from tests.plugins.direct import after_prompt, ids_of, kept

WINDOW = {"observation_window": 4, "recent_window": 4}
SMALL = {"h2o": {"recent_window": 4}, "snapkv": WINDOW, "corm": WINDOW, "r_kv": WINDOW, "kv_compress": WINDOW}
POLICIES = ["h2o", "snapkv", "tova", "l2norm", "keydiff", "random", "corm", "r_kv", "kv_compress", "expected_attention"]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("allocator", ["uniform", "adakv", "kv_compress"])
def test_a_padded_row_keeps_what_it_keeps_alone(name, allocator):
    policy = kvpolicy.registry.create("policy", name, SMALL.get(name, {}))
    short, long = ids_of(40), ids_of(64)
    ids = torch.cat([torch.nn.functional.pad(short, (24, 0)), long])
    mask = (torch.arange(64)[None] >= torch.tensor([24, 0])[:, None]).long()
    options = {"retention": 0.3, "allocator": allocator}
    together = kept(after_prompt(ids, policy, mask=mask, **options))
    for row, alone in enumerate((short, long)):
        own = kept(after_prompt(alone, policy, **options))
        assert {(layer, head): together[layer, row * 2 + head] for layer, head in own} == own


def test_a_padded_row_keeps_what_it_keeps_alone_around_another_policy():
    policy = kvpolicy.registry.create("policy", "critical_kv", {"inner_params": WINDOW})
    short, long = ids_of(40), ids_of(64)
    ids = torch.cat([torch.nn.functional.pad(short, (24, 0)), long])
    mask = (torch.arange(64)[None] >= torch.tensor([24, 0])[:, None]).long()
    together = kept(after_prompt(ids, policy, mask=mask, retention=0.3))
    for row, alone in enumerate((short, long)):
        own = kept(after_prompt(alone, policy, retention=0.3))
        assert {(layer, head): together[layer, row * 2 + head] for layer, head in own} == own
