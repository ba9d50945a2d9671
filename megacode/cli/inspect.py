"""The verb `megacode inspect`: what is in a dataset, as tables, text, a picture or JSON, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.bar import Bar
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from megacode.corpus import inspect
from megacode.data.indexed import with_ending
from megacode.data.records import input_files
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.report.document_lengths import log_edges, merged, plot_lengths
from megacode.terminal import count, gigabytes, print_table, progress_bar, table_console
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

EXAMPLE = """examples:
  megacode inspect data/quickstart/python/train
  megacode inspect data/quickstart/python/train --documents 0,100:103,-1
  megacode inspect data/quickstart/python/train data/quickstart/docs/train --plot lengths.png
  megacode inspect data/quickstart/python/train --verify
  megacode inspect from-megatron_text_document --tokenizer data/quickstart/tokenizer.model --documents 5 --verify

Documents are numbered from 0, through all shards. --verify reads every byte and ends with exit code 2 if anything is wrong.
"""

_READ = 1 << 16
"""Tokens of a document that are decoded at once, to say how long its text is."""
_STYLES = {"text": "", "control": "bold magenta", "unknown": "bold red"}
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megacode inspect`."""
    parser.description = "Show what is in a Megatron-Core IndexedDataset (.bin and .idx), made by megacode or by Megatron-LM."
    add = parser.add_argument
    add(
        "prefixes",
        nargs="+",
        type=Path,
        metavar="PREFIX",
        help="of PREFIX.bin and .idx, or of a sharded dataset",
    )
    add(
        "--documents",
        metavar="LIST",
        help="print these instead: numbers and half-open ranges, 0,5,100:103; from the end with =, --documents=-3:",
    )
    add("--tokens", action="store_true", help="with --documents: ids instead of text")
    add(
        "--limit",
        type=int,
        default=2000,
        metavar="N",
        help="with --documents: characters of each (%(default)s)",
    )
    add(
        "--verify",
        action="store_true",
        help="read everything and check it: index, ids, ends of documents, checksums",
    )
    add("--tokenizer", metavar="FILE", help="(the one that the manifest names)")
    add(
        "--tokenizer-kind",
        choices=("sentencepiece", "huggingface", "tiktoken"),
        help="(by the ending)",
    )
    add(
        "--added-tokens",
        default="none",
        metavar="LIST",
        help="with --tokenizer: `crystal`, or names split by commas",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="with --verify: every id must be below this (the tokenizer's)",
    )
    add("--plot", type=Path, metavar="FILE", help="also draw the lengths of documents (.png, .svg)")
    add(
        "--json",
        action="store_true",
        help="one JSON list on standard output, an entry for each dataset",
    )


def run(args: argparse.Namespace) -> int:
    """`megacode inspect`. UserError on mistakes, and on a dataset that --verify finds broken, after saying how."""
    if args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected 1 or more")
    if args.vocab_size is not None and args.vocab_size < 1:
        raise UserError(f"--vocab-size {args.vocab_size}: expected 1 or more")
    tokenizer = _given_tokenizer(args)
    console = table_console()
    elsewhere: list[str] = []
    given = dict.fromkeys(map(_bare, args.prefixes))
    prefixes = [one for path in given for one in inspect.datasets_at(path, elsewhere.append)]
    if elsewhere:
        print(f"in other folders, to be named by themselves: {_few(elsewhere)}", file=sys.stderr)
    entries, histograms, broken, problems = [], {}, [], 0
    for prefix in prefixes:
        entry: dict[str, Any] = {"prefix": str(prefix)}
        entries.append(entry)
        if args.verify:
            entry["verification"] = _verified(prefix, tokenizer, args.vocab_size)
            if entry["verification"]["count"]:
                problems += entry["verification"]["count"]
                broken.append(str(prefix))
            if not args.json:
                _print_verification(console, prefix, entry["verification"])
        if args.documents:
            dataset = inspect.open_dataset(prefix)
            chosen = inspect.parse_documents(args.documents, dataset.documents)
            own = (
                None if args.tokens else tokenizer or inspect.tokenizer_of(prefix, dataset.manifest)
            )
            shown = (
                _document(dataset, number, own, args.limit)
                for numbers in chosen
                for number in numbers
            )
            if args.json:
                entry["documents"] = [_plain(one) for one in shown]
            else:
                for one in shown:
                    _print_document(console, prefix, one)
        if args.plot or not (args.documents or args.verify):
            dataset = inspect.open_dataset(prefix)
            numbers = _counted(dataset)
            histograms[_name(prefix, prefixes)] = numbers.histogram
            entry |= summary(dataset, numbers)
            if not (args.json or args.documents or args.verify):
                _print_summary(console, entry, numbers)
    if args.plot:
        plot_lengths(histograms, args.plot)
        if not args.json:
            console.print(f"drawn: {args.plot}")
    if args.json:
        print(
            json.dumps(entries, indent=2, ensure_ascii=False)
            .encode(errors="backslashreplace")
            .decode()
        )
    if problems:
        what = "problem" if problems == 1 else "problems"
        raise UserError(
            f"{', '.join(broken)}: {problems:,} {what} found; copy it again, or tokenize it again"
        )
    return 0


def _bare(path: Path) -> Path:
    """A prefix may be given as one of its files."""
    if not path.name or path.name == "..":
        path = path.resolve()
    return path.with_suffix("") if path.suffix in (".bin", ".idx", ".json") else path


def _name(prefix: Path, prefixes: Sequence[Path]) -> str:
    """The short name of a dataset, where it is the only one of that name."""
    return prefix.name if sum(one.name == prefix.name for one in prefixes) == 1 else str(prefix)


def _given_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    if not args.tokenizer:
        if args.added_tokens != "none" or args.tokenizer_kind:
            raise UserError("--added-tokens and --tokenizer-kind go with --tokenizer FILE")
        return None
    added = (
        args.added_tokens
        if args.added_tokens in ("none", "crystal")
        else args.added_tokens.split(",")
    )
    return load_tokenizer(
        schema.TokenizerSection(path=args.tokenizer, kind=args.tokenizer_kind, added_tokens=added)
    )


# -------------------------------------------------------------------------------------------------------- summary


def summary(dataset: inspect.Dataset, numbers: inspect.Statistics) -> dict[str, Any]:
    """Header, statistics and manifest of a dataset as plain data."""
    manifest = dataset.manifest or {}
    run = manifest.get("run", {})
    files = {
        e: sum(with_ending(s.prefix, e).stat().st_size for s in dataset.shards)
        for e in (".bin", ".idx")
    }
    share = {str(limit): many / max(numbers.documents, 1) for limit, many in numbers.beyond.items()}
    out: dict[str, Any] = {
        "prefix": str(dataset.prefix),
        "format version": 1,
        "shards": len(dataset.shards),
        "token type": sorted({shard.dtype.name for shard in dataset.shards}),
        "sequences": numbers.sequences,
        "documents": numbers.documents,
        "tokens": numbers.tokens,
        "file bytes": files,
        "tokens per document": {
            "mean": numbers.mean,
            **{
                key: getattr(numbers, key)
                for key in ("median", "p90", "p99", "longest", "shortest")
            },
        },
        "share of documents longer than": share,
        "empty documents": numbers.empty,
        "histogram": {
            "edges": log_edges(1).tolist(),
            "documents": merged(numbers.histogram, log_edges(1))[0].tolist(),
        },
    }
    if manifest.get("bytes") and numbers.tokens:
        out["bytes per token"] = manifest["bytes"] / numbers.tokens
    if manifest:
        out["tokenizer"] = {
            **manifest.get("tokenizer", {}),
            "vocab_size": manifest.get("vocab_size"),
        }
        out["settings"] = run.get("settings") or {
            "digest": manifest.get("settings")
        }  # one dataset of a run names them only
        out["inputs"] = run.get("inputs") or _input_files(dataset.prefix)
    return out


def _input_files(prefix: Path) -> list[str]:
    try:
        return list(input_files(prefix))
    except (KeyError, TypeError, OSError, ValueError):
        return []


def _print_summary(console: Console, entry: Mapping[str, Any], numbers: inspect.Statistics) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    lengths = entry["tokens per document"]
    files = entry["file bytes"]
    shards = f", {entry['shards']:,} shards" if entry["shards"] > 1 else ""
    table.add_row(
        "format",
        f"IndexedDataset version {entry['format version']}, {' and '.join(entry['token type'])}{shards}",
    )
    table.add_row("files", f"{gigabytes(files['.bin'])} .bin, {gigabytes(files['.idx'])} .idx")
    sequences = (
        f" in {numbers.sequences:,} sequences" if numbers.sequences != numbers.documents else ""
    )
    empty = f", {numbers.empty:,} of them empty" if numbers.empty else ""
    table.add_row("documents", f"{numbers.documents:,}{sequences}{empty}")
    per_token = (
        f", {entry['bytes per token']:.2f} bytes of text each" if "bytes per token" in entry else ""
    )
    table.add_row(
        "tokens",
        f"{numbers.tokens:,}{f' ({count(numbers.tokens)})' if numbers.tokens >= 1e6 else ''}{per_token}",
    )
    table.add_row(
        "a document",
        ", ".join(
            f"{key} {value:,.{1 if key == 'mean' else 0}f}" for key, value in lengths.items()
        ),
    )
    beyond = [
        f"{share:.2%} beyond {int(limit):,}"
        for limit, share in entry["share of documents longer than"].items()
    ]
    table.add_row("", ", ".join(beyond))
    if "tokenizer" in entry:
        tokenizer = entry["tokenizer"]
        size = f", vocabulary of {tokenizer['vocab_size']:,}" if tokenizer.get("vocab_size") else ""
        table.add_row(
            "tokenizer",
            Text(f"{tokenizer.get('path')}{size}{_rest(tokenizer, ('path', 'vocab_size'))}"),
        )
        table.add_row(
            "settings",
            Text(_rest(entry["settings"], ("tokenizer", "input files")).removeprefix(", ") or "-"),
        )
        table.add_row("inputs", Text(_few([str(name) for name in entry["inputs"]]) or "-"))
    else:
        table.add_row(
            "manifest",
            f"none ({Path(entry['prefix']).name}.json): which tokenizer made it is not known",
        )
    console.print(Text(entry["prefix"], style="bold"))
    print_table(console, table)
    print_table(console, histogram_table(numbers.histogram))


def _rest(values: Mapping[str, Any], but: Sequence[str]) -> str:
    """What else a mapping of the manifest says, in a line; long fingerprints cut."""
    parts = []
    for key, value in values.items():
        if key in but or value is None or value in ([], {}, ""):
            continue
        shown = (
            json.dumps(value, ensure_ascii=False)
            if isinstance(value, (list, dict, bool))
            else str(value)
        )
        parts.append(f"{key} {shown[:12] + '…' if re.fullmatch('[0-9a-f]{32,}', shown) else shown}")
    return "".join(f", {part}" for part in parts)


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )


def histogram_table(histogram: np.ndarray) -> Table:
    """Rows of a doubling each, from the shortest document to the longest; `histogram` is a `length_histogram`."""
    edges = log_edges(1)
    documents, tokens = merged(histogram, edges)
    used = np.flatnonzero(documents)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("tokens", "documents", "share"):
        table.add_column(name, justify="right")
    table.add_column("", width=40)
    table.add_column("share of tokens", justify="right")
    for row in range(used[0], used[-1] + 1) if len(used) else ():
        low, high = int(edges[row]), int(edges[row + 1]) - 1
        table.add_row(
            f"{low:,}" if low == high else f"{low:,} to {high:,}",
            f"{documents[row]:,}",
            f"{documents[row] / documents.sum():.1%}",
            Bar(float(documents.max()), 0, float(documents[row]), width=40, color="blue"),
            f"{tokens[row] / max(tokens.sum(), 1):.1%}",
        )
    return table


# ------------------------------------------------------------------------------------------------------ documents


def _document(
    dataset: inspect.Dataset, number: int, tokenizer: Tokenizer | None, limit: int
) -> dict[str, Any]:
    """{document, tokens, pieces: [(kind, text)] within `limit` characters, left out: a few words or "", ids: [...]
    where there is no tokenizer}."""
    shard, first, tokens = dataset.span(number)
    out: dict[str, Any] = {"document": number, "tokens": tokens}
    if tokenizer is None:
        ids = inspect.read_tokens(shard, first, min(tokens, limit)).tolist()
        shown = int(
            np.searchsorted(
                np.cumsum([1 + len(str(token)) for token in ids]), limit + 1, side="right"
            )
        )
        rest = f"{tokens - shown:,} of {tokens:,} ids left out" if shown < tokens else ""
        return {
            **out,
            "ids": ids[:shown],
            "pieces": [("text", " ".join(map(str, ids[:shown])))],
            "left out": rest,
        }
    read = min(tokens, max(_READ, limit))
    while True:
        pieces = list(
            inspect.pieces_of_text(tokenizer, inspect.read_tokens(shard, first, read).tolist())
        )
        characters = sum(len(text) for _, text in pieces)
        if (
            read == tokens or characters > limit + 16
        ):  # a character may be cut in two where the reading stopped
            break
        read = min(tokens, 2 * read)
    out["pieces"], room = [], limit
    for kind, text in pieces:
        if room > 0:
            out["pieces"].append((kind, text[:room] if kind == "text" else text))
            room -= len(text)
    about, whole = (
        ("", characters) if read == tokens else ("about ", round(characters * tokens / read))
    )
    left = whole - sum(len(text) for _, text in out["pieces"])
    return {**out, "left out": f"{about}{left:,} of {whole:,} characters left out" if left else ""}


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    out = {key: document[key] for key in ("document", "tokens", "ids") if key in document}
    if "ids" not in out:
        out["text"] = "".join(text for _, text in document["pieces"])
    return {**out, **({"left out": document["left out"]} if document["left out"] else {})}


def _print_document(console: Console, prefix: Path, document: Mapping[str, Any]) -> None:
    console.rule(
        Text(
            f"{prefix.name}, document {document['document']:,}: {document['tokens']:,} tokens",
            style="dim",
        ),
        align="left",
        style="dim",
    )
    coloured = console.is_terminal and console.color_system and not console.no_color
    for kind, text in document["pieces"]:  # not through `console.print`, which makes spaces of tabs
        style = Style.parse(_STYLES[kind] if coloured else "")
        console.file.write(style.render(_visible(text), color_system=ColorSystem.STANDARD))
    console.file.write("\n")
    if document["left out"]:
        console.print(Text(f"[{document['left out']}]", style="dim italic"))


def _visible(text: str) -> str:
    r"""Control characters as \x1b, so that a document cannot steer the terminal; tabs and ends of lines stay."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


# --------------------------------------------------------------------------------------------------- verification


def _verified(prefix: Path, tokenizer: Tokenizer | None, vocab_size: int | None) -> dict[str, Any]:
    from megacode.corpus.verify import bytes_at, verify

    with progress_bar(f"verifying {prefix.name}", bytes_at(prefix), "bytes") as advance:
        result = verify(prefix, tokenizer, vocab_size, advance)
    return {**vars(result), "problems": list(result.problems), "unchecked": list(result.unchecked)}


def _print_verification(console: Console, prefix: Path, result: Mapping[str, Any]) -> None:
    numbers = f"{result['documents']:,} documents, {result['tokens']:,} tokens, highest id {result['highest']:,}"
    console.print(Text(str(prefix), style="bold"), Text(numbers, style="dim"), soft_wrap=True)
    for sentence in result["problems"]:
        console.print(Text.assemble(("wrong ", "bold red"), sentence), soft_wrap=True)
    if result["count"] > len(result["problems"]):
        console.print(f"and {result['count'] - len(result['problems']):,} more")
    for sentence in result["unchecked"]:
        console.print(Text.assemble(("not checked ", "yellow"), sentence), soft_wrap=True)
    if not result["count"]:
        console.print(
            Text(
                "whole: nothing wrong" + (" in what was checked" if result["unchecked"] else ""),
                "green",
            )
        )


# ------------------------------------------------------------------------------------------------------- progress


def _counted(dataset: inspect.Dataset) -> inspect.Statistics:
    with progress_bar(f"counting {dataset.prefix.name}", dataset.documents, "documents") as advance:
        return inspect.statistics(dataset, advance)
