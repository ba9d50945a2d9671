"""The verb `megacode preprocess`: arguments, the progress bar, and the table at the end."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from megacode.data import preprocess as work
from megacode.data.inputs import FORMATS
from megacode.errors import UserError
from megacode.recipe import schema

EXAMPLE = """examples:
  megacode preprocess 'corpus/*.jsonl.zst' --tokenizer tokenizer.model --output data/corpus --validation 0.01
  megacode preprocess python/*.parquet --text-field content --tokenizer tokenizer.json --output data/python
  megacode preprocess my-repository --include '*.py' --tokenizer tokenizer.model --output data/repository

Killed at any moment, the same command goes on where it was. What could not be read is in OUTPUT.quarantine.jsonl.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megacode preprocess`."""
    parser.description = (
        "Tokenize a corpus (JSONL, parquet, plain files; .gz, .zst; folders, globs) into a dataset of Megatron-Core."
    )
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or globs, read in the order given")
    parser.add_argument(
        "--tokenizer", required=True, metavar="FILE", help="SentencePiece .model, tokenizer.json, .tiktoken"
    )
    parser.add_argument(
        "--tokenizer-kind", choices=("sentencepiece", "huggingface", "tiktoken"), help="(by the ending)"
    )
    parser.add_argument(
        "--added-tokens",
        default="none",
        metavar="LIST",
        help="`crystal`, or names split by commas: as in the recipe (none)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="PREFIX.bin, .idx and .json are written"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of the text; a.b for nested (text)")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="what the inputs are (auto: by their endings)"
    )
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="in folders: only names like this"
    )
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--bos", action=yes_no, default=False, help="begin-of-sequence token before each document")
    parser.add_argument("--eod", action=yes_no, default=True, help="end-of-document token after each document")
    parser.add_argument(
        "--validation", type=float, default=0.0, metavar="F", help="share held out, by hash of the text (0)"
    )
    parser.add_argument("--validation-output", type=Path, metavar="PREFIX", help="(PREFIX_validation)")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="processes (%(default)s)")
    parser.add_argument(
        "--max-bad",
        default="1%",
        metavar="SHARE",
        help="end with exit code 2 if more of the records are bad, 0.1%% say (1%%)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was made from other settings")


def run(args: argparse.Namespace) -> int:
    """`megacode preprocess`. UserError on mistakes and, after all good records are written, on too many bad ones."""
    limit = parse_share(args.max_bad)
    if not 0.0 <= args.validation < 1.0:
        raise UserError(
            f"--validation {args.validation:g}: expected a share of the documents from 0 to below 1, 0.01 say"
        )
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected 1 or more")
    added = args.added_tokens if args.added_tokens in ("none", "crystal") else args.added_tokens.split(",")
    section = schema.Tokenizer(
        path=args.tokenizer, kind=args.tokenizer_kind, added_tokens=added, bos=args.bos, eod=args.eod
    )
    request = work.Request(
        inputs=tuple(args.inputs),
        tokenizer=section,
        output=_prefix(args.output),
        validation=args.validation,
        validation_output=args.validation_output and _prefix(args.validation_output),
        text_field=args.text_field,
        format=args.format,
        include=tuple(args.include),
        overwrite=args.overwrite,
    )
    console = Console()
    try:
        result = preprocess_visibly(request, args.workers, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    if result.bad_share > limit:
        raise UserError(
            f"{result.counts.bad.total():,} of {result.counts.records:,} records are bad ({result.bad_share:.2%}, over "
            f"--max-bad {args.max_bad}); the good ones are in {request.output}, the bad ones with their reasons in "
            f"{result.quarantine}"
        )
    return 0


def preprocess_visibly(request: work.Request, workers: int, console: Console, title: str | None = None) -> work.Result:
    """`preprocess` with a progress bar (a line now and then where there is no terminal) and a table after it."""
    started = time.monotonic()
    with _progress(console, title or request.output.name) as (on_start, on_progress):
        result = work.preprocess(request, workers, on_start, on_progress)
    seconds = time.monotonic() - started
    if result.kept:
        console.print(f"{request.output}: kept; already made from these files with these settings")
    elif result.parts_kept:
        console.print(f"{request.output}: {result.parts_kept} of {result.parts} parts were done before and kept")
    console.print(results_table(result, None if result.kept else seconds))
    return result


def results_table(result: work.Result, seconds: float | None) -> Table:
    """Documents, tokens and so on by dataset, then what was left out."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    table.add_column("dataset", overflow="fold")
    for name in ("documents", "tokens", "MB", "bytes/token", "longest"):
        table.add_column(name, justify="right")
    for split, path in result.outputs.items():
        n = result.counts.splits[split]
        row = (
            f"{n.documents:,}",
            f"{n.tokens:,}",
            f"{n.bytes / 1e6:,.1f}",
            f"{n.bytes / n.tokens:.2f}",
            f"{n.longest:,}",
        )
        table.add_row(min(str(path), os.path.relpath(path), key=len), *row)
    notes = []
    if seconds is not None and not result.parts_kept:
        total = [sum(getattr(n, name) for n in result.counts.splits.values()) for name in ("bytes", "tokens")]
        notes.append(f"{seconds:.1f} s, {total[0] / 1e6 / seconds:,.1f} MB/s, {total[1] / seconds:,.0f} tokens/s")
    for what, reasons in (("bad", result.counts.bad), ("passed over", result.counts.passed_over)):
        notes += [f"{what}: {count:,} × {reason}" for reason, count in reasons.most_common(8)]
    if result.counts.repaired:
        notes.append(f"repaired: {result.counts.repaired:,} documents with lone surrogates, now U+FFFD")
    if result.quarantine:
        notes.append(f"left out, with reasons: {result.quarantine}")
    table.caption = "\n".join(notes)
    return table


@contextmanager
def _progress(console: Console, title: str) -> Iterator[tuple]:
    """Callbacks for `preprocess` that move a bar. The bar goes by bytes on disk, the rates by text and tokens."""
    totals = {"bytes": 0, "tokens": 0, "bad": 0}
    started = time.monotonic()
    spoke = started
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(title, total=None, rates="")

    def rates() -> str:
        seconds = max(time.monotonic() - started, 1e-3)
        bad = f"  {totals['bad']:,} bad" if totals["bad"] else ""
        return f"{totals['bytes'] / 1e6 / seconds:.1f} MB/s  {totals['tokens'] / seconds / 1e3:,.0f} k tokens/s{bad}"

    def on_start(total_bytes: int, done_bytes: int) -> None:
        bar.update(task, total=total_bytes, completed=done_bytes)

    def on_progress(progress: work.Progress) -> None:
        nonlocal spoke
        totals["bytes"] += progress.text_bytes
        totals["tokens"] += progress.tokens
        totals["bad"] += progress.bad
        bar.update(task, advance=progress.input_bytes, rates=rates())
        if not console.is_terminal and time.monotonic() - spoke > 30:
            spoke = time.monotonic()
            console.print(f"{title}: {bar.tasks[0].percentage:.0f} %  {rates()}")

    if not console.is_terminal:
        yield on_start, on_progress
        return
    with bar:
        yield on_start, on_progress


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_share(text: str) -> float:
    """`0.1%` -> 0.001; `0.001` -> 0.001. UserError for anything outside 0 to 1."""
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UserError(f"--max-bad {text}: expected a share of the records, such as 0.1% or 0.001")
    return share


def _prefix(path: Path) -> Path:
    """A prefix may be given as one of its files."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
