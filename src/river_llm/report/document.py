"""A report as a list of blocks, and how they are written as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """\
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif;
       color: #111; background: #fff; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #bbb; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; background: #eee; padding: 0.6rem; white-space: pre-wrap; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; background: #fff; }
"""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list."""

    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines as they are."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as long as the headings; the first column is of words, the others of numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file.

    Attributes:
        path: relative to the report's folder.
        caption: what it shows.
    """

    path: Path
    caption: str


Block = Heading | Paragraph | Bullets | Code | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """The report in Markdown, which names the pictures' files."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """The report as one page that needs nothing else: pictures are within it.

    Args:
        folder: that the pictures' paths are relative to.
    """
    title = next(b.text for b in blocks if isinstance(b, Heading) and b.level == 1)
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_plain(line)}" for line in block.lines)
    if isinstance(block, Code):
        return "\n".join(f"    {line}" for line in block.text.splitlines())
    if isinstance(block, Table):
        rule = ["---", *["---:"] * (len(block.headings) - 1)]
        rows = [block.headings, rule, *block.rows]
        return "\n".join(f"| {' | '.join(_cell(c) for c in row)} |" for row in rows)
    return f"![{_plain(block.caption)}]({block.path.as_posix()})"


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Bullets):
        lines = "\n".join(f"<li>{html.escape(line)}</li>" for line in block.lines)
        return f"<ul>\n{lines}\n</ul>"
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.headings)
        rows = "\n".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in block.rows
        )
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    data = base64.b64encode((folder / block.path).read_bytes()).decode()
    caption = html.escape(block.caption)
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" alt="{caption}">\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _plain(text: str) -> str:
    """On one line, without marks of Markdown."""
    marked = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>" else c for c in marked)


def _cell(text: str) -> str:
    return text if set(text) <= set("-:") else _plain(text).replace("|", "\\|")
