"""`kvpolicy doctor` and `kvpolicy validate`."""

import importlib
import json

import pytest


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """On a machine without copies and, as far as doctor sees, without a driver."""
    monkeypatch.setattr(importlib.import_module("kvpolicy.verbs.doctor"), "_DRIVER", tmp_path / "none")
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def findings(result):
    return {row["name"]: row for row in result.json}


def test_a_sound_machine_is_well(kvpolicy, empty_cache):
    result = kvpolicy("doctor", "--device", "cpu", "--json")
    found = findings(result)
    assert result.code == 0, found
    names = {"kvpolicy", "torch", "transformers", "triton", "driver", "kernels", "graph", "model", "plugins", "disk"}
    assert names <= found.keys()
    assert found["kernels"]["status"] == "note" and "torch's, on cpu" in found["kernels"]["text"]
    assert "CUDA graphs need a CUDA device" in found["graph"]["text"]
    shown = kvpolicy("doctor", "--device", "cpu")
    assert shown.code == 0 and "nothing is wrong" in shown.out and "KVPOLICY_CACHE=" in shown.out


def test_a_damaged_copy_is_wrong(kvpolicy, empty_cache):
    (empty_cache / "x-0123").mkdir(parents=True)
    (empty_cache / "x-0123" / "model.safetensors").write_bytes(b"half")
    result = kvpolicy("doctor", "--json")
    assert result.code == 2
    assert findings(result)["converted"]["status"] == "wrong" and "delete it" in findings(result)["converted"]["text"]
    assert "1 of " in kvpolicy("doctor").out


def test_a_driver_that_torch_cannot_use_is_wrong(kvpolicy, empty_cache, tmp_path, monkeypatch):
    module = importlib.import_module("kvpolicy.verbs.doctor")
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC version: 12\n")
    monkeypatch.setattr(module, "_DRIVER", file)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    found = findings(kvpolicy("doctor", "--device", "cpu", "--json"))["driver"]
    assert found["status"] == "wrong" and "580.65.06, but " in found["text"]


def test_a_sound_plan_is_said_to_be_one(kvpolicy, tuned):
    plan = tuned[0]
    result = kvpolicy("validate", plan)
    assert (result.code, result.err) == (0, "") and "30 %, 50 % kept" in result.out
    said = kvpolicy("validate", plan, "--model", json.loads(plan.read_text())["model"]["id"], "--json").json
    assert said["warnings"] == [] and said["retentions"] == [0.3, 0.5] and len(said["sha256"]) == 64


def test_faults_of_a_plan_name_the_field(refused, tuned, tmp_path):
    document = json.loads(tuned[0].read_text())
    document["levels"][1]["shares"][0][0] = -1
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(document))
    assert "levels[1].shares" in refused("validate", path)
    document = json.loads(tuned[0].read_text())
    document["method"]["policy"]["name"] = "nobody"
    path.write_text(json.dumps(document))
    assert "there is no policy named 'nobody'" in refused("validate", path)
    assert "was made for another model" in refused("validate", tuned[0], "--model", "smollm2-135m")


def test_a_plan_whose_allocator_is_not_here_runs_and_says_so(kvpolicy, tuned, tmp_path):
    document = json.loads(tuned[0].read_text())
    document["method"]["allocator"]["name"] = "nobody"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    result = kvpolicy("validate", path)
    assert result.code == 0 and "cannot be made again here" in result.err
