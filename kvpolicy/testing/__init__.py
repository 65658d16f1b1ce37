"""Conformance kit for plugin authors: one call checks every law of a role, without a model.

    from kvpolicy.testing import check_allocator

    def test_my_allocator():
        check_allocator(MyAllocator)

Give a class (its defaults are used) or an instance. Each check raises `AssertionError` with the law that was broken,
the input, what came back, and what to do. pytest is not needed.
"""

from kvpolicy.testing.allocator import check_allocator
from kvpolicy.testing.characters import CharacterTokenizer
from kvpolicy.testing.estimator import check_estimator
from kvpolicy.testing.laws import LawError
from kvpolicy.testing.policy import check_eviction_policy
from kvpolicy.testing.suggestions import RecordingTrial
from kvpolicy.testing.synthetic import SyntheticProbe
from kvpolicy.testing.task_check import check_task

__all__ = [
    "CharacterTokenizer",
    "LawError",
    "RecordingTrial",
    "SyntheticProbe",
    "check_allocator",
    "check_estimator",
    "check_eviction_policy",
    "check_task",
]
