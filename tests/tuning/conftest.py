import pytest

from kvpolicy.plugins.registry import registry
from kvpolicy.tuning import search_method


@pytest.fixture
def offered(monkeypatch):
    """offered(cls): the name under which the search finds a class of ours."""
    doubles = {}

    class Doubled:
        def get(self, role, name):
            return doubles.get(name) or registry.get(role, name)

        def create(self, role, name, params=None):
            return doubles[name](**(params or {})) if name in doubles else registry.create(role, name, params)

    def offer(cls, name=None):
        name = name or cls.__name__.lower()
        doubles[name] = cls
        return name

    monkeypatch.setattr(search_method, "registry", Doubled())
    return offer
