"""Runs -> one HTML page that needs no other file."""

from __future__ import annotations

from pathlib import Path

import jinja2

from megacode.report import comparison, drawing, figures, palette, tables
from megacode.report.run_data import Run
from megacode.version import __version__


def page(runs: list[Run]) -> str:
    """The report of one run, or of several side by side, as HTML."""
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            runs=runs,
            colours=palette.domain_colours(comparison.all_domains(runs)),
            comparison=comparison,
            drawing=drawing,
            figures=figures,
            palette=palette,
            tables=tables,
            version=__version__,
        )
    )


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of this room and of other folders, with the filters that pages use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"svg": drawing.svg, "css": palette.css_variables}
    return made
