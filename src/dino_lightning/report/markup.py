"""Pieces of a page that several of its parts have: tables, remarks, and the page around them all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

ASSETS = ("page.css", "charts.js", "page.js")


@dataclass(frozen=True)
class Cell:
    """What stands in a table, as HTML."""

    html: str
    figure: bool = False
    """Numbers stand at the right."""
    main: bool = False
    """The best of its column."""
    words: bool = False
    """A sentence, which needs some width."""


def note(text: str) -> str:
    """A remark."""
    return f'<p class="soft">{escape(text)}</p>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that scrolls in itself where the page is narrow; the first cell of a row names it."""
    figures = [cell.figure for cell in rows[0]] if rows else []
    head = "".join(
        f'<th scope="col"{" class=figure" if figure else ""}>{escape(name)}</th>'
        for name, figure in zip(header, figures, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{first.html}</th>{"".join(map(_cell, others))}</tr>' for first, *others in rows
    )
    return (
        f'<div class="card wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    asked = (("figure", cell.figure), ("main", cell.main), ("words", cell.words))
    kinds = " ".join(kind for kind, given in asked if given)
    return f'<td class="{kinds}">{cell.html}</td>' if kinds else f"<td>{cell.html}</td>"


def bar(percent: float) -> str:
    """A share of 100, drawn."""
    return f'<span class="track"><span class="bar" style="width:{min(max(percent, 0), 100):.2f}%"></span></span>'


def section(title: str, content: str) -> str:
    """A part of the page, with its heading."""
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>'


def page(*, kind: str, title: str, lead: str, parts: Sequence[str], footer: str, data: str) -> str:
    """The whole page, style sheet and scripts in it. `title` is text, the others are HTML, `data` is JSON."""
    template, *assets = (
        files("dino_lightning.report").joinpath("assets", name).read_text("utf-8") for name in ("page.html", *ASSETS)
    )
    values = {
        "kind": kind,
        "title": escape(title),
        "lead": lead,
        "parts": "\n".join(parts),
        "footer": footer,
        "data": data,
        **dict(zip(("css", "charts", "script"), assets, strict=True)),
    }
    # In one pass, so that braces in a value stay what they are.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)
