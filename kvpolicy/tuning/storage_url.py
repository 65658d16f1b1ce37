"""Storage URLs as they may be shown: without the password that stands in them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

_HIDDEN = "***"


def shown(storage: str | Path | None) -> str:
    """`postgresql://***@host/db`: who and what for is left out, and so is all behind a question mark.

    An `@` that stands where no user can end makes the rest unsafe to tell apart: only the kind is shown then.
    """
    text = str(storage)
    kind, is_url, rest = text.partition("://")
    if not is_url or rest.startswith("/"):  # a file
        return text.partition("?")[0]
    address, query, _ = rest.partition("?")
    authority, slash, path = address.partition("/")
    user, at, host = authority.rpartition("@")
    if "@" in rest[len(authority) :]:
        return f"{kind}://{_HIDDEN}"
    return f"{kind}://{_HIDDEN + at if user else ''}{host}{slash}{path}{query and '?' + _HIDDEN}"


def hidden(message: str, storage: str | Path | None) -> str:
    """The message of a driver, in which the URL and its secrets are not readable."""
    text = str(storage)
    message = message.replace(text, shown(storage))
    for secret in sorted(_secrets(text), key=len, reverse=True):
        message = message.replace(secret, _HIDDEN)
    return message


def _secrets(text: str) -> set[str]:
    _, is_url, rest = text.partition("://")
    if not is_url:
        return set()
    password = rest.rpartition("@")[0].partition(":")[2]
    values = [pair.partition("=")[2] for pair in rest.partition("?")[2].split("&")]
    return {password, unquote(password), *values, *map(unquote, values)} - {""}
