"""The verb `report`: a run's page of plots, or several runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from megacode.errors import UserError
from megacode.files import write_text

EXAMPLE = """examples:
  megacode report runs/crystal-tiny
  megacode report runs/code-25 runs/code-50 runs/code-75 --output compare.html
  megacode report recipes/sweeps/code-share-tiny.yaml

The page is one file: no scripts, no network; it can be mailed. A run that is still training is
shown as far as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder; several are compared; or a sweep",
    )
    page = "the page (RUN/report.html; of several runs, comparison.html in the first)"
    add("--output", type=Path, metavar="FILE", help=page)


def run(args: argparse.Namespace) -> int:
    from megacode.studies.sweep import is_sweep, open_sweep

    if any(map(is_sweep, args.runs)):
        if len(args.runs) > 1 or args.output:
            raise UserError(
                "a sweep's page is in the folder of its runs, and shows it alone; give one "
                "sweep's file, without --output"
            )
        from megacode.cli.sweep import show_results

        show_results(open_sweep(args.runs[0]))
        return 0
    from megacode.report.page import page
    from megacode.report.run_data import read_runs

    name = "report.html" if len(args.runs) == 1 else "comparison.html"
    output = args.output or args.runs[0] / name
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file, such as {output / name}")
    html = page(read_runs(args.runs))
    try:
        write_text(output, html)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); choose another --output"
        ) from error
    print(f"report: {output}")
    return 0
