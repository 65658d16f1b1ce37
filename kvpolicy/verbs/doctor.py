"""What kvpolicy finds on this machine, and what of it is wrong."""

from __future__ import annotations

import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from kvpolicy.errors import PluginWarning, first_line
from kvpolicy.measure.machine import memory_bytes
from kvpolicy.plugins.registry import registry
from kvpolicy.report.numbers import size
from kvpolicy.verbs import arguments

_DRIVER = Path("/proc/driver/nvidia/version")
_SETTINGS = ("KVPOLICY_CACHE", "KVPOLICY_PLUGINS", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRITON_INTERPRET")
_LITTLE = 2 * 10**9  # bytes of disk: a converted copy of the default model, a plan, a study


Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    status: "ok"; "note", which explains how kvpolicy behaves here; "wrong", which is to be put right
    """

    name: str
    status: Status
    text: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `kvpolicy doctor` answers."""

    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        return all(finding.status != "wrong" for finding in self.findings)

    def to_json(self) -> list[dict[str, Any]]:
        """What `kvpolicy doctor --json` prints."""
        return [asdict(finding) for finding in self.findings]


def doctor(device: str = "auto") -> Diagnosis:
    """Looks at the driver, the libraries, the kernels, the models, the plugins and the disk. Loads no model.

    device: whose kernels and graphs are asked about; "auto" is a CUDA device if there is one

    Raises `ModelError` for a device that is not there.
    """
    where = arguments.pick_device(device)
    return Diagnosis((*_libraries(), *_device(where), *_models(), *_plugins(), *_disk(), *_settings()))


def _libraries() -> Iterator[Finding]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("kvpolicy", "ok", f"{version('kvpolicy')}, {system}")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    count = torch.get_num_threads()
    yield Finding("torch", "ok", f"{torch.__version__}, {build}, {count} thread{'s' * (count > 1)}")
    from kvpolicy.integrations.transformers.model.versions import TESTED

    ours, (oldest, newest) = version("transformers"), TESTED
    known = _minor(oldest) <= _minor(ours) <= _minor(newest)
    yield Finding("transformers", "ok" if known else "note", f"{ours}; tested with {oldest} to {newest}")
    yield Finding("optuna", "ok", version("optuna"))
    try:
        yield Finding("triton", "ok", version("triton"))
    except PackageNotFoundError:
        yield Finding("triton", "note", "not installed: torch does the work of its kernels")


def _minor(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


def _device(where: str) -> Iterator[Finding]:
    driver = _driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            text = f"{about.name}, {size(about.total_memory)}, compute capability {about.major}.{about.minor}"
            yield Finding(f"GPU {index}", "ok", text)
        yield Finding("driver", "ok", driver or "not told by the system")
    elif driver is None:
        yield Finding("driver", "note", "no NVIDIA driver is loaded: everything runs on the CPU")
    else:
        unused = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU: too old?"
        yield Finding("driver", "wrong", f"{driver}, but {unused}")
    memory = memory_bytes("cpu")
    yield Finding("memory", "ok", f"{'not told by the system' if memory is None else size(memory)} in this machine")
    on_gpu = torch.device(where).type == "cuda"
    if not on_gpu:
        yield Finding("kernels", "note", f"torch's, on {where}: Triton's kernels run on CUDA devices")
        yield Finding("graph", "note", f"none, on {where}: CUDA graphs need a CUDA device")
        return
    try:
        version("triton")
        yield Finding("kernels", "ok", f"Triton's, on {where}; torch does what they cannot, or have not been tried at")
    except PackageNotFoundError:
        yield Finding("kernels", "wrong", f"torch's, on {where}, and slow there: pip install triton")
    yield Finding("graph", "ok", f"possible on {where}; DecodeRunner.why says where a model cannot be captured")


def _driver() -> str | None:
    """What the system says of its NVIDIA driver, None without one."""
    try:
        found = re.search(r"(?:Kernel Module|Module for \S+)\s+(\S+)", _DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else "of unknown version"


def _models() -> Iterator[Finding]:
    from kvpolicy.defaults import MODEL
    from kvpolicy.integrations.transformers.model.converted import copies
    from kvpolicy.integrations.transformers.model.load import resolve

    yield Finding("model", "ok", f"{MODEL} is taken from {resolve(MODEL)[1]}")
    for folder, damage in copies():
        bytes_ = sum(file.stat().st_size for file in folder.iterdir())
        text = f"{folder}, {size(bytes_)}"
        yield Finding("converted", "wrong" if damage else "ok", f"{text}{f': {damage}; delete it' if damage else ''}")


def _plugins() -> Iterator[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the findings say it
        rows = registry.rows()
    usable = [row for row in rows if row.status == "ok"]
    owners = sorted({f"{row.distribution} {row.version}" for row in usable})
    yield Finding("plugins", "ok" if usable else "wrong", f"{len(usable)} work, of {', '.join(owners) or 'nobody'}")
    for row in rows:
        if row.status != "ok":
            whose = f"{row.role} {row.name}".strip()
            status: Status = "wrong" if row.status in ("broken", "conflict") else "note"
            yield Finding("plugin", status, f"{whose} of {row.distribution} {row.version} is {row.status}: {row.error}")


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    from kvpolicy.files.user_cache import cache_directory

    for what, folder in (
        ("converted models", cache_directory()),
        ("the Hub's files", Path(constants.HF_HUB_CACHE)),
        ("here", Path.cwd()),
    ):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            yield Finding("disk", "wrong", f"{what}, {folder}: {first_line(error)}")
            continue
        writable = os.access(there, os.W_OK)
        status: Status = "wrong" if not writable else "ok" if free >= _LITTLE else "note"
        text = f"{size(free)} free for {what}" if what != "here" else f"{size(free)} free here"
        yield Finding("disk", status, f"{text} ({folder}){'' if writable else ', which cannot be written'}")


def _settings() -> Iterator[Finding]:
    for name in _SETTINGS:
        if name in os.environ:
            yield Finding("environment", "note", f"{name}={os.environ[name]}")
