"""Renders the report's Jinja templates (`assets/*.html`); text is escaped unless it is `Markup`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dino_lightning.report.charts import COLLAPSE
from dino_lightning.report.svg import COLORS


@dataclass(frozen=True)
class Cell:
    """One cell of a table; a plain string is escaped."""

    content: str | Markup
    kind: str = ""
    """CSS classes: `figure` (right-aligned), `main` (the best value), `words` (a sentence)."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def bar(percent: float) -> Markup:
    """A horizontal bar for a percentage."""
    width = f"{min(max(percent, 0), 100):.2f}%"
    return Markup('<span class="track"><span class="bar" style="width:{}"></span></span>').format(width)


def code(text: str) -> Markup:
    """Text in a monospaced font."""
    return Markup("<code>{}</code>").format(text)


def figure(value: float, formatted: str) -> Markup:
    """A formatted number with its exact value, which a browser's tools and tests can read."""
    return Markup('<data value="{!r}">{}</data>').format(value, formatted)


def render(template: str, **values: Any) -> str:
    """The page from a template in `assets`."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dino_lightning.report", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {"asset": _asset, "bar": bar, "COLORS": COLORS, "COLLAPSE_SECTION": COLLAPSE}
    # Compact JSON for the charts; `tojson` escapes characters that could close the script element.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _asset(name: str) -> Markup:
    """A style sheet or script, inserted as it is."""
    return Markup(files("dino_lightning.report").joinpath("assets", name).read_text("utf-8"))
