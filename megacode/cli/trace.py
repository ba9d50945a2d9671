"""The verb `trace`: which documents were in step N. Imports no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megacode.cli.arguments import add_overrides
from megacode.errors import UserError

EXAMPLE = """examples:
  megacode trace runs/crystal-tiny --step 240               # the batch's documents and their files
  megacode trace runs/crystal-tiny --step 240 --text        # with the beginning of each
  megacode trace runs/crystal-tiny --step 240 --sample 3    # one sequence as it was trained on
  megacode trace runs/crystal-tiny --step 240 --check       # is it the batch that was trained on?
  megacode trace recipes/crystal-tiny.yaml --step 1 --json  # before the run, from the recipe alone

Steps are numbered as in metrics.jsonl, from 1; sequences within the batch from 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    name = "RUN_OR_RECIPE"
    add("run_or_recipe", type=Path, metavar=name, help="a run's folder, or a recipe file")
    add("--step", type=int, required=True, metavar="N", help="step of the run, 1 for the first")
    add("--text", action="store_true", help="show the first characters of each document")
    add("--sample", type=int, metavar="K", help="show sequence K of the batch, as trained on")
    add("--check", action="store_true", help="compare the batch with the run's metrics.jsonl")
    add("--json", action="store_true", help="print JSON instead")
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Print the documents of a step; 0, or 1 where --check finds another batch."""
    from megacode.data.trace import as_dict, open_trace, recorded_digest

    trace = open_trace(args.run_or_recipe, args.step, tuple(args.overrides))
    facts: dict[str, Any] = {
        "step": args.step,
        "phase": trace.phase.name,
        "sequence_length": trace.phase.sequence_length,
    }
    if args.check:
        recorded = recorded_digest(args.run_or_recipe, args.step)
        if recorded is None:
            raise UserError(
                f"--check: {args.run_or_recipe / 'metrics.jsonl'} has no step {args.step}; "
                "give the folder of a run that trained it"
            )
        digest = trace.digest()
        facts |= {"batch": digest, "recorded": recorded, "equal": digest == recorded}
    if args.sample is not None:
        facts["content"] = trace.sample(args.sample)
    chosen = trace.samples() if args.sample is None else trace.samples()[args.sample :][:1]
    facts["samples"] = [as_dict(trace, origin, args.text) for origin in chosen]
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _show(facts, args.text)
    return 1 if facts.get("equal") is False else 0


def _show(facts: dict[str, Any], with_text: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    samples, length = facts["samples"], facts["sequence_length"]
    sequences = f"{len(samples):,} sequence{'s' * (len(samples) != 1)} of {length:,} tokens"
    console.print(f"step {facts['step']:,}, {facts['phase']}: {sequences}")
    if "equal" in facts:
        other = f"NOT the run's batch {facts['recorded']}"
        said = "the batch that the run recorded" if facts["equal"] else other
        console.print(f"digest {facts['batch']}: {said}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    parts = [part for sample in samples for part in sample["documents"]]
    marked = {key: key for key in ("answers", "members") if any(key in part for part in parts)}
    if marked:
        marked["trained on"] = "trained_tokens"
    made = any("synthesis" in part for part in parts)
    heads = (
        "sample",
        "source",
        "epoch",
        "document",
        "tokens",
        *marked,
        "from",
        *["made by"] * made,
        *["text"] * with_text,
    )
    for head in heads:
        number = head in ("sample", "epoch", "answers", "members", "trained on")
        table.add_column(head, no_wrap=True, justify="right" if number else "left")
    for sample in samples:
        about = [str(sample["sample"]), sample["stream"], str(sample["epoch"])]
        for part in sample["documents"]:
            document = f"{Path(part['shard']).name}:{part['document']}"
            tokens = f"{part['first']:,}-{part['end'] - 1:,} of {part['document_tokens']:,}"
            origin = "" if part["file"] is None else f"{part['file']}:{part['record']}"
            counts = [str(part.get(key, "")) for key in marked.values()]
            row = [*about, document, tokens, *counts, printable(origin)]
            row += [printable(_made_by(part.get("synthesis")))] if made else []
            row += [printable(part["text"])[:80]] if with_text else []
            table.add_row(*map(Text, row))
            about = ["", "", ""]
    # As wide as its content: a terminal wraps lines, a pipe keeps them whole.
    wide = Console(highlight=False, width=10_000)
    Console(highlight=False, width=wide.measure(table).maximum).print(table)
    if content := facts.get("content"):
        mask, text = content["loss_mask"], content["text"]
        if text is None:
            text = " ".join(map(str, content["tokens"]))
        counted = f"{sum(mask):,} of {len(mask):,} labels count in the loss; as trained on:"
        console.print(f"\n{counted}\n")
        console.print(Text(printable(text, "\t\n")))


def _made_by(synthesis: dict[str, Any] | None) -> str:
    """Operator, parent and sample, models."""
    if synthesis is None:
        return ""
    models = ", ".join(f"{role} {name}" for role, name in synthesis["models"].items())
    return f"{synthesis['operator']} of {synthesis['parent']}#{synthesis['sample']} by {models}"


def printable(text: str, keep: str = "") -> str:
    """`text` with what a terminal would obey (line ends, escapes) written out."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
