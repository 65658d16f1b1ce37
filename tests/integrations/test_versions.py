"""What differs between the releases of transformers."""

import tomllib
import warnings
from pathlib import Path

import pytest
from transformers import DynamicCache
from transformers.generation.utils import GenerationMixin

import kvpolicy
from kvpolicy import VersionWarning
from kvpolicy.integrations.transformers.model import versions
from tests.tiny import tiny_ids, tiny_model

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def taken_names():
    """The names under which this release takes a cache: from 5.24 on both, the old one with a warning."""
    newest = versions.cache_name(GenerationMixin.prepare_inputs_for_generation)
    return ["past_key_values"] if newest == "past_key_values" else ["cache", "past_key_values"]


@pytest.mark.parametrize("name", taken_names())
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_every_name_that_transformers_takes_works(name):
    model, ids = tiny_model("Llama"), tiny_ids(100)
    expected_cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=16)
    expected = kvpolicy.generate(model, expected_cache, ids, **OPTIONS)
    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=16)
    assert model.generate(ids, **{name: cache}, **OPTIONS).tolist() == expected.tolist()
    assert cache.lengths.tolist() == expected_cache.lengths.tolist() and cache.get_seq_length() == 107
    model(expected[:, -1:], **{name: cache})
    assert cache.get_seq_length() == 108
    with kvpolicy.attached(model, retention=0.3, min_tokens=16):
        out = model(ids, **{name: DynamicCache(config=model.config)})
    assert isinstance(out.past_key_values, kvpolicy.RaggedCache) and out.past_key_values.get_seq_length() == 100


def test_a_cache_may_come_by_position():
    model, ids = tiny_model("Llama"), tiny_ids(100)
    with kvpolicy.attached(model, retention=0.3, min_tokens=16):
        out = model(ids, None, None, DynamicCache(config=model.config))
    assert isinstance(out.past_key_values, kvpolicy.RaggedCache)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 2}, {"prefill_chunk_size": 7}, {}])
def test_own_code_gives_no_warning(options):
    model, ids = tiny_model("Llama"), tiny_ids(40)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kvpolicy.generate(model, kvpolicy.new_cache(model, retention=0.5, min_tokens=8), ids, **OPTIONS, **options)
    assert [str(warning.message) for warning in told] == []


@pytest.mark.parametrize(("version", "count"), [("5.24.3", 0), ("5.17.0", 0), ("5.25.0.dev0", 1), ("6.0.0", 1)])
def test_a_newer_release_is_told_once_at_attach(monkeypatch, version, count):
    model = tiny_model("Llama")
    # not this file's `transformers`: the package replaces its own module object while it is imported
    monkeypatch.setattr(versions.transformers, "__version__", version)
    versions.warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kvpolicy.attach(model)
        kvpolicy.detach(model)
        kvpolicy.attach(model)
    versions.warn_if_untested.cache_clear()
    assert [warning.category for warning in told] == [VersionWarning] * count
    assert all("newer than 5.24" in str(warning.message) and warning.filename == __file__ for warning in told)


def test_the_tested_releases_are_those_of_the_project():
    root = Path(__file__).parents[2]
    requires = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={versions.TESTED[0]}" in requires
    assert f"transformers=={versions.TESTED[1]}." in (root / "constraints.txt").read_text()
    assert f"OLDEST = {versions.TESTED[0]}." in (root / "Makefile").read_text()
    assert (
        f"transformers {versions.TESTED[0]} to {versions.TESTED[1]}" in (root / "docs/how-to/run-a-plan.md").read_text()
    )
