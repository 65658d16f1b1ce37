"""Text of files and plugins as it may be shown: what a terminal would obey is taken out."""

from __future__ import annotations

import re
from html import escape

# control characters but for tab and line end, what turns the direction of writing, halves of surrogate pairs
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with a replacement character for each character that is not shown but obeyed."""
    return _OBEYED.sub("\ufffd", text)


def markdown_text(text: str) -> str:
    """The text on one line of a Markdown page, where it is nothing but text: no cell, tag, link or picture begins."""
    return re.sub(r"([\\\[\]|`])", r"\\\1", escape(plain(" ".join(text.split())), quote=False))
