"""The public names: sorted, complete, and nothing beside them."""

from __future__ import annotations

import importlib
import types

import pytest

import kvpolicy

PACKAGES = ["kvpolicy", "kvpolicy.testing"]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_complete(package: str) -> None:
    module = importlib.import_module(package)
    # Submodules become attributes once imported; the two names come from the import machinery of annotations.
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and name not in ("annotations", "TYPE_CHECKING")
    }
    public |= set(vars(module).get("_LAZY", ()))
    assert list(module.__all__) == sorted(module.__all__)
    assert set(module.__all__) == public


def test_names_that_are_imported_late_exist() -> None:
    for name in kvpolicy._LAZY:
        assert getattr(getattr(kvpolicy, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="no attribute 'tun'"):
        kvpolicy.tun  # noqa: B018


def test_dir_lists_every_public_name() -> None:
    assert set(kvpolicy.__all__) | {"__version__"} <= set(dir(kvpolicy))


def test_names_of_the_plugin_interface() -> None:
    assert isinstance(kvpolicy.registry, importlib.import_module("kvpolicy.plugins.registry").Registry)
    assert callable(kvpolicy.hookimpl) and isinstance(kvpolicy.Register, type)
