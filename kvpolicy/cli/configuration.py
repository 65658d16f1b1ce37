"""--config: options of a verb from a TOML or YAML file, and the file beside results that repeats a run (TOML)."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from kvpolicy.errors import KVPolicyError
from kvpolicy.files.regular import read_bytes, write_bytes

_MOST_BYTES = 2**20
_YAML = (".yaml", ".yml")
_NOT_SETTINGS = ("config", "json", "quiet")
_RESULTS = ("out", "records")  # options that name what a verb writes; the file lies beside


def read(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of --config: what the file says is what options have that are not on the command line.

    Raises `KVPolicyError` naming the file.
    """
    if path is None or context.resilient_parsing:
        return path
    try:
        document = _read(path)
    except (KVPolicyError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise KVPolicyError(f"cannot read the options in {path}: {reason}") from None
    context.default_map = _options(context, document, path)
    return path


def _read(path: Path) -> dict[str, Any]:
    text = read_bytes(path, _MOST_BYTES).decode()
    if path.suffix.lower() not in _YAML:
        return tomllib.loads(text)
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None
    if not isinstance(document, dict):
        raise ValueError(f"expected lines of 'option: value', got {type(document).__name__}")
    return {str(name): value for name, value in document.items()}


def _options(context: typer.Context, document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of this verb: those in the table of its name, or a file without tables of verbs as a whole."""
    verb = str(context.info_name)
    verbs: set[str] = set(getattr(context.parent.command, "commands", ())) if context.parent else {verb}
    tables = {name for name in verbs & document.keys() if isinstance(document[name], dict)}
    if tables and verb not in tables:
        raise KVPolicyError(f"{path} has options of {', '.join(sorted(tables))} and none of {verb}: expected [{verb}]")
    options: dict[str, Any] = document[verb] if tables else document
    known = {str(param.name): param for param in context.command.params}
    values = {}
    for name, value in options.items():
        param = known.get(name.replace("-", "_"))
        if param is None or param.name in _NOT_SETTINGS:
            names = ", ".join(sorted(key.replace("_", "-") for key in known.keys() - {*_NOT_SETTINGS}))
            raise KVPolicyError(f"{path}: {verb} has no option '{name}'; it has {names}")
        if isinstance(value, dict):  # [policy-param] kernel_size = 7
            value = [f"{key}={json.dumps(item, default=str)}" for key, item in value.items()]
        is_several = bool(getattr(param, "multiple", False)) or param.nargs == -1
        values[str(param.name)] = [value] if is_several and not isinstance(value, list) else value
    return values


def keep(context: typer.Context) -> None:
    """Writes what a verb was run with beside what it wrote: `plan.json.toml`, with which --config runs it again."""
    results = next((context.params[name] for name in _RESULTS if context.params.get(name) is not None), None)
    if results is None:
        return
    settings = {name: value for name, value in context.params.items() if name not in _NOT_SETTINGS}
    lines = [
        f"{name.replace('_', '-')} = {_toml(value)}" for name, value in settings.items() if value not in (None, [])
    ]
    path = Path(f"{results}.toml")
    head = f"# kvpolicy {version('kvpolicy')}; again: kvpolicy {context.info_name} --config {path.name}"
    write_bytes(path, "\n".join([_one_line(head), f"[{context.info_name}]", *lines, ""]).encode())


def _one_line(text: str) -> str:
    """A comment of one line, whatever a file is called."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _toml(value: Any) -> str:
    """A value of an option. JSON's strings are TOML's but for one character, and so are its numbers and lists."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
