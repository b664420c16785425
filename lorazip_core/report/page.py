"""The skeleton of a page: a verdict, figures in tiles, tables, and charts whose library is inside the page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import jinja2
import plotly.offline
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.io.json import to_json_plotly

from .. import __version__
from ..base.text import plain


class Tile(NamedTuple):
    """One figure to be seen first."""

    label: str
    value: str
    note: str = ""
    bad: bool = False
    """Whether it stands out as not good enough."""


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    """The columns that are flush right."""
    caption: str = ""
    bad: frozenset[int] = frozenset()
    """The rows that stand out as not good enough."""


class Chart(NamedTuple):
    title: str
    figure: Figure
    caption: str = ""

    @property
    def data(self) -> Markup:
        """The figure as JSON that is safe inside a script element: no '<', '>' or '/' is left in it.

        The engine is named, since 'auto' would take another one, and give other bytes, where it is installed.
        """
        return Markup(to_json_plotly(self.figure, engine="json"))


class Page(NamedTuple):
    kind: str
    """What the page is, above its title."""
    title: str
    verdict: str
    good: bool | None
    """The colour of the verdict: None for one that is neither."""
    lead: str
    made: Sequence[str]
    """Lines below the lead: how what is shown was made, and what was asked of it."""
    tiles: Sequence[Tile]
    sections: Sequence[Table | Chart]


def render(page: Page) -> str:
    """The page as HTML. All of its text is escaped, and its control characters shown, by the template."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = plain
    return environment.from_string(_file("page.html")).render(
        page=page,
        version=__version__,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        plotly=Markup(plotly.offline.get_plotlyjs()) if any(isinstance(s, Chart) for s in page.sections) else "",
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
