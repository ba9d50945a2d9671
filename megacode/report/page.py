"""Runs -> one HTML page that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from megacode.plan.estimate import parameter_count
from megacode.report import comparison, figures, palette, tables
from megacode.report.run_data import Run
from megacode.terminal import count
from megacode.version import __version__


def page(runs: Sequence[Run]) -> str:
    """The report of one run, or of several side by side, as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    domains = comparison.all_domains(list(runs))
    hue = palette.hues(domains)
    several = len(runs) > 1
    return environment.get_template("page.html.j2").render(
        title=" · ".join(run.label for run in runs),
        colours=palette.css(),
        hue=hue,
        version=__version__,
        sections=[_run_section(run, hue, brief=several) for run in runs],
        compared=_compared(list(runs), hue) if several else None,
    )


def _run_section(run: Run, hue: dict[str, int], brief: bool) -> dict[str, object]:
    vocabulary = (run.plan or {}).get("vocab_size") or run.recipe.model.vocab_size
    length = max(phase.sequence_length for phase in run.recipe.phases)
    parameters = parameter_count(run.recipe.model, vocabulary, length) if vocabulary else None
    small = [] if brief else figures.small_figures(run)
    return {
        "label": run.label,
        "recipe": run.recipe.name,
        "description": run.recipe.description,
        "lead": lead(run),
        "facts": tables.facts(run, parameters),
        "phases": tables.phases(run),
        "validation": tables.validation(run),
        "sources": tables.sources(run),
        "history": tables.history(run),
        "loss": figures.loss_by_domain(run, hue),
        "loss_by_source": None if brief else figures.loss_by_source(run, hue),
        "mixture": figures.mixture(run, hue),
        "small": small,
        "samples": run.samples,
        "recipe_text": run.recipe_text,
        "has_mfu": run.train.has("mfu"),
        "planned": bool(run.phases),
    }


def _compared(runs: list[Run], hue: dict[str, int]) -> dict[str, object]:
    return {
        "table": tables.comparison(runs),
        "losses": comparison.losses(runs, hue),
        "differences": comparison.differences(runs, hue),
        "ratios": comparison.ratios(runs, hue),
        "small": comparison.small_figures(runs),
        "bands": bool(comparison.common_bands(runs)),
    }


def lead(run: Run) -> str:
    """One sentence: how far it is and what it reached."""
    planned = (run.plan or {}).get("steps")
    done = (
        f"{run.steps_done:,} steps"
        if planned in (None, run.steps_done)
        else f"{run.steps_done:,} of {planned:,} steps"
    )
    text = f"{done}, {count(float(run.train['tokens'][-1]))} tokens in {tables.clock(float(np.nansum(run.train['seconds'])))}."
    losses = (run.validations[-1].get("loss_by_domain") or {}) if run.validations else {}
    known = {
        name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)
    }
    if known:
        text += (
            " Validation loss: "
            + ", ".join(f"{name} {loss:.3f}" for name, loss in known.items())
            + "."
        )
    unknown = int(np.isnan(run.train["loss"]).sum())
    if unknown:
        text += f" In {unknown:,} step{'s' * (unknown > 1)} the loss was not a finite number."
    return text
