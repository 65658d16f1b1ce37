"""Any operations in any order on a transformers model: its cache keeps what the naive model keeps.

`KVPOLICY_SEQUENCES=5000 pytest tests/integrations/test_random_cache_operations.py` plays as many; a failure names its
seed.
"""

import pytest

from tests.cache.game import sequences
from tests.integrations.cache_game import CacheGame


@pytest.mark.parametrize("seed", sequences(60))
def test_a_cache_keeps_what_the_naive_model_keeps(seed, monkeypatch, tmp_path):
    CacheGame(seed, monkeypatch, tmp_path).play(6)
