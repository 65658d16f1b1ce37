"""One version stands everywhere."""

import re
from pathlib import Path

import pytest

import kvpolicy

ROOT = Path(__file__).parents[2]
PLACES = {
    "pyproject.toml": r'^version = "(.*)"$',
    "CHANGELOG.md": r"^## \[(.*?)\]",
    "CITATION.cff": r"^version: (.*)$",
    "SECURITY.md": r"kvpolicy is at ([\d.]+);",
    "docs/index.md": r"^Version ([\d.]+) ",
    "plugins/vllm/pyproject.toml": r'^version = "(.*)"$',
    "plugins/vllm/kvpolicy_vllm/__init__.py": r'^__version__ = "(.*)"$',
}


@pytest.mark.parametrize("place", PLACES)
def test_the_version_is_that_of_the_package(place):
    found = re.search(PLACES[place], (ROOT / place).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None and found[1] == kvpolicy.__version__


def test_what_needs_kvpolicy_takes_this_release_and_later_ones():
    minor = ".".join(kvpolicy.__version__.split(".")[:2])
    for place in ("plugins/vllm/pyproject.toml", "plugins/template/pyproject.toml"):
        assert f'"kvpolicy>={minor}"' in (ROOT / place).read_text(encoding="utf-8")
