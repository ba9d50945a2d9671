"""The verb `report`: a run's page of plots, or several runs compared."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megacode.errors import UserError

EXAMPLE = """examples:
  megacode report runs/crystal-tiny
  megacode report runs/code-25 runs/code-50 runs/code-75 --output compare.html

The page is one file: no scripts, no network; it can be mailed. Of a run that is still training it shows what there is so far."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder; several are compared over tokens",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes (default: RUN/report.html, or comparison.html in the first of several)",
    )


def run(args: argparse.Namespace) -> int:
    from megacode.report.page import page
    from megacode.report.run_data import read_runs

    output = args.output or args.runs[0] / (
        "report.html" if len(args.runs) == 1 else "comparison.html"
    )
    if output.is_dir():
        raise UserError(
            f"--output {output}: is a folder; name a file, such as {output / 'report.html'}"
        )
    html = page(read_runs(args.runs))
    write_page(output, html)
    print(f"report: {output}")
    return 0


def write_page(path: Path, html: str) -> None:
    """Whole or not at all.

    Raises:
        UserError: the folder is not there or not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another --output"
        ) from error
