"""The table of sources: what it says is there is there."""

from __future__ import annotations

import re
from dataclasses import fields

from kvpolicy import DecodeStep, LayerActivations
from kvpolicy.cache.prompt_sources import SUPPLIERS
from kvpolicy.plugins.source_table import NEED_CACHE, OUTLIVE_PROMPT, SOURCES, TABLE, supplied_by


def test_each_source_of_a_prompt_is_a_field_that_is_described() -> None:
    names = {field.name for field in fields(LayerActivations)} - {"layer"}
    assert names == SOURCES - {"decode_attention"}
    described = re.findall(r"^ {4}([a-z_, ]+): ", LayerActivations.__doc__ or "", re.M)
    assert names <= {name for line in described for name in line.split(", ")}


def test_a_store_has_a_supplier_for_each_source_of_its() -> None:
    assert SUPPLIERS.keys() == supplied_by("store")


def test_each_source_of_a_step_is_a_field() -> None:
    names = {field.name for field in fields(DecodeStep)}
    assert {"attention" if name == "decode_attention" else name for name in supplied_by("step")} <= names


def test_each_source_has_a_supplier() -> None:
    assert all(source.suppliers and source.cost for source in TABLE.values())
    assert supplied_by("probe", "store", "model", "step") == SOURCES
    assert not NEED_CACHE & supplied_by("probe")
    assert "queries" not in OUTLIVE_PROMPT and "keys" in OUTLIVE_PROMPT
