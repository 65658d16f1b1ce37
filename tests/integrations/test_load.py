"""Loading: a checkpoint holds the whole model or is refused by name, a damaged copy of a GGUF is made again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpolicy import ModelError, ModelWarning, load_model
from kvpolicy.integrations.transformers import load_config
from kvpolicy.integrations.transformers.model.load import resolve
from tests.tiny_gguf import save_tiny_gguf

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """checkpoint(tensors, **config): a copy of the tiny checkpoint after both were edited."""

    def make(tensors=None, **config):
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
        held = load_file(folder / "model.safetensors")
        (tensors or (lambda held: None))(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | config))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (lambda held: held.pop(f"{Q}.weight"), {}, f"it lacks {Q}.weight$"),
        (lambda held: held.pop("lm_head.weight"), {}, "it lacks lm_head.weight$"),
        (None, {"num_hidden_layers": 3}, "it lacks model.layers.2.input_layernorm.weight, .* and 6 more$"),
        (None, {"num_hidden_layers": 1}, "beyond its configuration model.layers.1.input_layernorm.weight, .* and 6 m"),
        (None, {"vocab_size": 400}, r"in another shape lm_head.weight \[318, 32\] for \[400, 32\], model.embed_tokens"),
        (lambda held: held.update({f"{Q}.bias": torch.ones(32)}), {}, f"beyond its configuration {Q}.bias$"),
    ],
)
def test_a_checkpoint_that_is_not_its_configurations(checkpoint, tensors, config, said):
    folder = checkpoint(tensors, **config)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(folder)
    assert str(caught.value).startswith(f"the directory {folder} does not hold the model of its configuration: it ")


def extra(held):
    """What older releases wrote, and a part that a language model is loaded without."""
    held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "vision.proj.weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("tensors", "config"),
    [(lambda held: held.pop("lm_head.weight"), {"tie_word_embeddings": True}), (extra, {})],
)
def test_what_may_be_absent_or_besides(checkpoint, tensors, config):
    model, _ = load_model(checkpoint(tensors, **config))
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"null", "cannot load the model"),
        ("config.json", b'{"model_type": "llama", "num_hidden_layers": "x"}', "num_hidden_layers': TypeError"),
        ("config.json", b'{"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}', "contains custom code"),
        ("model.safetensors", b"", "cannot load the model .* header too small"),
        ("generation_config.json", b'{"eos', "cannot read .*generation_config.json"),
        ("tokenizer.json", b"[]", "cannot load the tokenizer of the model"),
        ("tokenizer.json", b"{}", "cannot load the tokenizer of the model .* KeyError: 'added_tokens'"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_directory(checkpoint, file, content, said):
    folder = checkpoint()
    with open(f"{folder}/{file}", "wb") as damaged:
        damaged.write(content)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(folder)
    assert folder in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 300, "^no model named 'x"),
        ("a/" + "x" * 300, "no Hub id can be so: Repo id must use"),
        ("a/b/c", "no Hub id can be so: Repo id must be in the form"),
        ("a\0/b", "no Hub id can be so"),
        ("/nowhere", "^no model directory at '/nowhere'$"),
        ("x" * 300 + ".gguf", "^no GGUF file at"),
    ],
)
def test_a_name_that_names_nothing(name, said):
    with pytest.raises(ModelError, match=said):
        resolve(name)


def test_a_model_of_the_hub_without_a_network():
    with pytest.raises(
        ModelError, match=r"^cannot load the model 'nobody/nothing' from the Hugging Face Hub"
    ) as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("has_address", [True, False])
def test_a_hub_without_an_address_is_not_asked_again_and_again(monkeypatch, has_address):
    def address(host, port):
        if not has_address:
            raise OSError("Name or service not known")

    def from_pretrained(source, **options):
        asked.append(options["local_files_only"])
        raise OSError("it is not here")

    asked = []
    monkeypatch.setattr("socket.getaddrinfo", address)
    monkeypatch.setattr("kvpolicy.files.hub.getproxies", dict)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match=r"\(nobody/nothing\): it is not here$"):
        load_config("nobody/nothing")
    assert asked == [not has_address]


# --- GGUF


@pytest.fixture
def gguf(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    return save_tiny_gguf(tmp_path / "tiny.gguf", tiny_checkpoint)


def copies(tmp_path):
    return list((tmp_path / "cache" / "models").iterdir())


def logits(source):
    model, tokenizer = load_model(str(source))
    return model(**tokenizer("banana doberu", return_tensors="pt")).logits


def test_a_gguf_gives_the_model_it_was_made_of_and_is_converted_once(gguf, tiny_checkpoint, tmp_path):
    assert torch.equal(logits(gguf), logits(tiny_checkpoint))
    [copy] = copies(tmp_path)
    written = (copy / "model.safetensors").stat().st_mtime_ns
    assert torch.equal(logits(gguf), logits(tiny_checkpoint))
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    assert load_config(str(gguf)).num_hidden_layers == 2


FILES = ["config.json", "generation_config.json", "model.safetensors", "sha256.json", "tokenizer.json"]


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def emptied(copy):
    for path in copy.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda copy, file=file: flipped(copy / file) for file in FILES),
        *(lambda copy, file=file: (copy / file).unlink() for file in FILES),
        lambda copy: (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000]),
        lambda copy: (copy / "model.safetensors").write_bytes(b""),
        lambda copy: (copy / "config.json").write_text("{}"),
        lambda copy: (copy / "sha256.json").write_text("[1]"),
        lambda copy: (copy / "sha256.json").write_text("[" * 100000),
        lambda copy: (copy / "adapter_config.json").write_text("{}"),
        emptied,
    ],
)
def test_a_damaged_copy_is_made_anew_and_said_to_be(gguf, tiny_checkpoint, tmp_path, damage):
    load_model(str(gguf))
    [copy] = copies(tmp_path)
    damage(copy)
    with pytest.warns(ModelWarning, match="tiny.gguf in .* was damaged .* made again$") as warned:
        assert torch.equal(logits(gguf), logits(tiny_checkpoint))
    assert len(warned) == 1
    assert copies(tmp_path) == [copy]
    load_model(str(gguf))  # without a word


def test_a_copy_without_a_place_is_named(gguf, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ModelError, match=r"cannot write the converted copy .*set KVPOLICY_CACHE"):
        load_model(str(gguf))


@pytest.mark.parametrize(
    ("length", "load"),
    [
        (0, load_model),
        (3, load_config),
        (30, load_model),
        (1000, load_config),
        (10000, load_model),
        (150000, load_model),
    ],
)
def test_a_gguf_cut_short_is_one_line_that_names_it(gguf, tmp_path, length, load):
    gguf.write_bytes(gguf.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"^cannot read .*tiny.gguf") as caught:
        load(str(gguf))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "models").exists() or copies(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"merges": ["q zz"]}, "cannot read the GGUF file .*damaged.gguf, cut short, damaged or unknown"),
        ({"merges": []}, "cannot read the GGUF file .*damaged.gguf, cut short, damaged or unknown"),
        ({"without": ["model.norm.weight"]}, "the GGUF file .* it lacks model.norm.weight$"),
    ],
)
def test_a_gguf_that_is_not_whole(gguf, tiny_checkpoint, tmp_path, damage, said):
    with pytest.raises(ModelError, match=said):
        load_model(str(save_tiny_gguf(tmp_path / "damaged.gguf", tiny_checkpoint, **damage)))
