"""An HTML page that is one file: no script, and nothing that is fetched. All texts are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from kvpolicy.files.plain import plain

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 1.5rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.45rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; }
th { text-align: right; font-weight: 600; vertical-align: bottom; } th.name, th.words { text-align: left; }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } td.name { text-align: left; }
td.words { text-align: left; white-space: normal; min-width: 9rem; }
table.facts th { vertical-align: top; text-align: left; white-space: nowrap; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .beside { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; } figcaption { font-weight: 600; margin: .3rem 0; }
table.heat { font-size: 11px; line-height: 1.25; } table.heat th, table.heat td { border: 0; padding: .1rem .3rem; }
table.heat th { font-weight: 400; color: #666; text-align: right; } table.heat td { min-width: 1.9rem; }
table.heat.small td { min-width: .5rem; padding: 0; height: .65rem; }
figure.chart { width: 100%; max-width: 33rem; } svg { width: 100%; height: auto; display: block; }
ul.legend { list-style: none; padding: 0; margin: .4rem 0; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; }
ul.legend i { display: inline-block; width: .6em; height: .6em; margin-right: .4em; border-radius: 50%; }
.warning { border-left: 4px solid #d55e00; padding: .1rem .8rem; background: #fdf3ec; } .note { color: #555; }
.tokens { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole document. sections: HTML"""
    name = text(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def text(value: str) -> str:
    """Text of a file or a plugin, as HTML that is nothing but text, also in an attribute."""
    return escape(plain(value))


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and what they are."""
    body = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>\n" for name, value in rows)
    return f'<table class="facts">\n{body}</table>'


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> str:
    """A table of figures. words: the heads of columns that hold prose"""
    classes = ["" if index else ' class="name"' for index in range(len(heads))]
    classes = [' class="words"' if name in words else of for name, of in zip(heads, classes, strict=True)]
    head = "".join(f"<th{of}>{text(name)}</th>" for name, of in zip(heads, classes, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{of}>{text(cell)}</td>" for of, cell in zip(classes, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def warning(line: str) -> str:
    return f'<p class="warning">{text(line)}</p>'
