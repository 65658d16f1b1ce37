"""Any operations in any order: a store keeps what the naive model keeps, and its outputs are masked dense attention.

`KVPOLICY_SEQUENCES=20000 pytest tests/cache/test_random_operations.py` plays as many; a failure names its seed.
"""

import pytest

from tests.cache.game import Game, sequences


@pytest.mark.parametrize("seed", sequences(150))
def test_a_store_keeps_what_the_naive_model_keeps(seed, monkeypatch):
    Game(seed).play(monkeypatch, 6)
