"""The verb `trace`: which documents were in step N. Imports no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode.errors import UserError

if TYPE_CHECKING:
    from megacode.data.trace import Trace

EXAMPLE = """examples:
  megacode trace runs/crystal-tiny --step 240               # the documents of the batch, and where they come from
  megacode trace runs/crystal-tiny --step 240 --text        # with the beginning of each
  megacode trace runs/crystal-tiny --step 240 --sample 3    # one sequence in full, after fill-in-the-middle
  megacode trace runs/crystal-tiny --step 240 --check       # is it the batch that was trained on?
  megacode trace recipes/crystal-tiny.yaml --step 1 --json  # before the run, from the recipe alone

Steps are numbered as in metrics.jsonl, from 1; sequences within the batch from 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_or_recipe", type=Path, metavar="RUN_OR_RECIPE", help="a run's folder, or a recipe file"
    )
    parser.add_argument(
        "--step", type=int, required=True, metavar="N", help="step of the run, 1 for the first"
    )
    parser.add_argument(
        "--text", action="store_true", help="show the first characters of each document"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="K",
        help="show sequence K of the batch in full, as trained on",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the batch with what the run's metrics.jsonl says",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe",
    )


def run(args: argparse.Namespace) -> int:
    """Print the documents of a step; 0, or 1 where --check finds another batch. UserError for mistakes."""
    from megacode.data.trace import as_dict, open_trace

    trace = open_trace(args.run_or_recipe, args.step, tuple(args.overrides))
    facts: dict[str, Any] = {
        "step": args.step,
        "phase": trace.phase.name,
        "sequence_length": trace.phase.sequence_length,
    }
    if args.check:
        facts |= _checked(trace, args.run_or_recipe, args.step)
    if args.sample is not None:
        facts["content"] = trace.sample(args.sample)
        chosen = trace.mixture.describe(trace.step, [args.sample])
    else:
        chosen = trace.samples()
    facts["samples"] = [as_dict(trace, origin, args.text) for origin in chosen]
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _show(facts, args.text)
    return 1 if facts.get("equal") is False else 0


def _checked(trace: Trace, run: Path, step: int) -> dict[str, Any]:
    from megacode.data.trace import recorded_digest

    recorded = recorded_digest(run, step)
    if recorded is None:
        raise UserError(
            f"--check: {run / 'metrics.jsonl'} has no step {step}; give the folder of a run that trained it"
        )
    digest = trace.digest()
    return {"batch": digest, "recorded": recorded, "equal": digest == recorded}


def _show(facts: dict[str, Any], with_text: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    samples = facts["samples"]
    console.print(
        f"step {facts['step']:,}, {facts['phase']}: {len(samples):,} sequence{'s' if len(samples) != 1 else ''} of "
        f"{facts['sequence_length']:,} tokens"
    )
    if "equal" in facts:
        said = (
            "the batch that the run recorded"
            if facts["equal"]
            else f"NOT the run's batch {facts['recorded']}"
        )
        console.print(f"digest {facts['batch']}: {said}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in (
        "sample",
        "source",
        "epoch",
        "document",
        "tokens",
        "from",
        *(["text"] if with_text else []),
    ):
        table.add_column(
            head, no_wrap=True, justify="right" if head in ("sample", "epoch") else "left"
        )
    for sample in samples:
        for number, part in enumerate(sample["documents"]):
            first = number == 0
            origin = "" if part["file"] is None else f"{part['file']}:{part['record']}"
            table.add_row(
                str(sample["sample"]) if first else "",
                Text(sample["stream"] if first else ""),
                str(sample["epoch"]) if first else "",
                Text(f"{Path(part['shard']).name}:{part['document']}"),
                f"{part['first']:,}-{part['end'] - 1:,} of {part['document_tokens']:,}",
                Text(printable(origin)),
                *([Text(printable(part["text"])[:80])] if with_text else []),
            )
    wide = Console(highlight=False, width=10_000)  # a terminal wraps lines, a pipe keeps them whole
    Console(highlight=False, width=wide.measure(table).maximum).print(table)
    if content := facts.get("content"):
        counted = sum(content["loss_mask"])
        console.print(
            f"\n{counted:,} of {len(content['loss_mask']):,} labels count in the loss; as trained on:\n"
        )
        shown = (
            content["text"]
            if content["text"] is not None
            else " ".join(map(str, content["tokens"]))
        )
        console.print(Text("\n".join(printable(line, "\t") for line in shown.split("\n"))))


def printable(text: str, keep: str = "") -> str:
    """`text` with what a terminal would obey (line ends, escapes) written out."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
