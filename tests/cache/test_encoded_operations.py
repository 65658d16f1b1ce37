"""Any operations in any order under a format: codes never change, and outputs are attention over what they say.

`KVPOLICY_SEQUENCES=10000 pytest tests/cache/test_encoded_operations.py` plays as many; a failure names its seed.
"""

import pytest

from kvpolicy.cache.encoded_arena import EncodedArena
from tests.cache.encoded_game import EncodedGame
from tests.cache.game import sequences


@pytest.mark.parametrize("seed", sequences(30))
def test_a_store_of_codes_keeps_what_the_naive_model_keeps(seed, monkeypatch):
    EncodedGame(seed).play(monkeypatch, 6)


@pytest.mark.parametrize("seed", sequences(30))
def test_a_store_that_reads_codes_gives_the_same(seed, monkeypatch):
    """As a GPU does: codes that have exact copies are left out, and the copies come beside them."""
    monkeypatch.setattr(EncodedArena, "reads_codes", True)
    EncodedGame(seed).play(monkeypatch, 6)
