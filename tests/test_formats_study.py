"""What the study of formats takes for KIVI and ThinK, against their rules written out."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def study():
    before, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    import formats_study

    yield formats_study
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        path = getattr(sys.modules[name], "__file__", None)
        if path and "benchmarks" in Path(path).parts:
            del sys.modules[name]


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(study, bits):
    keys, values = torch.randn(2, 300, 64)
    found_keys, found_values = study.kivi(keys, values, bits)
    assert torch.equal(found_keys[256:], keys[256:]), "the last 300 mod 128 keys are exact"
    assert torch.equal(found_values[172:], values[172:]), "and the last 128 values"
    for group, coded in ((keys[32:64, 5], found_keys[32:64, 5]), (values[9, 32:], found_values[9, 32:])):
        levels = coded.unique()
        assert len(levels) <= 2**bits
        step = (group.max() - group.min()) / (2**bits - 1)
        assert (coded - group).abs().max() <= 0.5 * step + 0.02 * group.abs().max()  # bf16 steps and minima
    row = 64 * bits / 8
    coded_bytes = 256 * row + 8 * 64 * 4 + 172 * (row + 2 * 4)
    assert study.kivi_bytes(300, 64, bits) == coded_bytes + (44 + 128) * 64 * 2
    assert study.kivi_bytes(100, 64, bits) == 2 * 100 * 64 * 2, "below the residual all is exact"


def test_think(study):
    queries, keys = torch.randn(32, 3, 64), torch.randn(100, 64) * torch.linspace(0.1, 2, 64)
    found = study.thinned(queries, keys)
    score = [float((queries[..., d] ** 2).mean() * (keys[:, d] ** 2).mean()) for d in range(64)]
    dropped = sorted(range(64), key=score.__getitem__)[:25]
    assert not found[:68, dropped].any()
    kept = [d for d in range(64) if d not in dropped]
    assert torch.equal(found[:, kept], keys[:, kept])
    assert torch.equal(found[68:], keys[68:]), "the last 32 keys are whole"


def test_bytes_of_every_way(study):
    per_entry = {way.name: way.nbytes(1024) / 1024 for way in study.ways(64)}
    assert per_entry["16 bits"] == 256
    assert per_entry["int8"] == 2 * 68
    assert per_entry["int4"] == pytest.approx((36 * 256 + 988 * 72) / 1024)
    assert per_entry["kivi2"] == pytest.approx(16 + 8 + (896 * (16 + 8) + 128 * 128) / 1024)
    assert per_entry["think"] == pytest.approx(128 + 128 * 32 / 1024 + 78 * 992 / 1024, abs=0.01)


def test_capacities_fill_their_bytes(study):
    shares = torch.rand(3, 2) + 0.1
    for way in study.ways(64):
        table = study.capacities(way, shares, 0.3, 1024, 64)
        allowed = 0.3 * 6 * 1024 * 256
        assert study.weight(way, table) <= allowed
        if not way.name.startswith("kivi"):  # whose bytes do not always rise with its entries
            assert study.weight(way, table) > 0.985 * allowed


def test_knapsack(study):
    from formats_knapsack import knapsack

    torch.manual_seed(0)
    tokens, channels = torch.rand(2, 3, 200), torch.rand(2, 3, 32)
    tokens[..., -32:] = tokens[..., :4] = torch.inf
    dense = 2 * 3 * 200 * 32 * 4
    before = 0
    for level in (0.3, 0.5, 0.8):
        values, keys, spent = knapsack(tokens, channels, level * dense)
        assert 0.9 * level < spent / dense <= level
        assert (values[tokens.isinf()] == 16).all()
        for bits, worth in ((values, tokens), (keys, channels)):
            by_worth = bits.gather(-1, worth.argsort(-1))
            assert (by_worth.diff(dim=-1) >= 0).all(), "what matters more has no fewer bits"
        assert int(values.sum() + keys.sum()) > before
        before = int(values.sum() + keys.sum())
