"""The verb `inspect`: what is in a dataset, as tables, text, a picture or JSON; is it whole?"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.bar import Bar
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from megacode.cli.arguments import add_tokenizer, at_least, tokenizer_section, without_ending
from megacode.cli.trace import printable
from megacode.corpus import inspect
from megacode.data.indexed import with_ending
from megacode.data.lengths import log_edges, merged
from megacode.data.loss_marks import EQUIVALENT, ROLES, has_marks, open_marks, trained
from megacode.data.planning import count_trained
from megacode.data.records import input_files
from megacode.data.source import TokenSource
from megacode.errors import UserError
from megacode.terminal import print_table, progress_bar, table_console, table_of
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

EXAMPLE = """examples:
  megacode inspect data/quickstart/python/train
  megacode inspect data/quickstart/python/train --documents 0,100:103,-1
  megacode inspect data/quickstart/python/train data/quickstart/docs/train --plot lengths.png
  megacode inspect data/quickstart/python/train --verify
  megacode inspect from-megatron_text_document --documents 5 --verify \\
    --tokenizer data/quickstart/tokenizer.model

Documents are numbered from 0, through all shards. --documents takes numbers and half-open ranges,
counted from the end with `=`: --documents=-3:. --verify reads every byte and ends with exit code 2
if anything is wrong. Without --tokenizer, the manifest names the tokenizer.

Of a file that megacode pairs made (.jsonl): how many candidates of which kind; with --documents,
the pairs beside their candidates.
"""

_STYLES = {"text": "", "control": "bold magenta", "unknown": "bold red"}
_ANSWER = "on dark_green"
_GREEN = {"answers": "answers", "equivalent": "of equivalent candidates"}
"""What is shown so, by key of a document."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what is in an IndexedDataset, made by megacode or by Megatron-LM."
    add = parser.add_argument
    add(
        "prefixes",
        nargs="+",
        type=Path,
        metavar="PREFIX",
        help="of PREFIX.bin and PREFIX.idx, or a PAIRS.jsonl",
    )
    add("--documents", metavar="LIST", help="print these documents instead, such as 0,5,100:103")
    add("--tokens", action="store_true", help="with --documents: ids instead of text")
    add("--limit", type=at_least(1), default=2000, metavar="N", help="characters of a document")
    add("--verify", action="store_true", help="check index, ids, ends of documents and checksums")
    add_tokenizer(parser, required=False)
    add("--vocab-size", type=at_least(1), metavar="N", help="--verify: ids are below N")
    add("--plot", type=Path, metavar="FILE", help="also draw the lengths of documents (.png, .svg)")
    add("--json", action="store_true", help="print one JSON list, with an entry for each dataset")


def run(args: argparse.Namespace) -> int:
    if not args.tokenizer and (args.added_tokens != "none" or args.tokenizer_kind):
        raise UserError("--added-tokens and --tokenizer-kind go with --tokenizer FILE")
    tokenizer = load_tokenizer(tokenizer_section(args)) if args.tokenizer else None
    console = table_console()
    if any(path.suffix == ".jsonl" for path in args.prefixes):
        return _show_pairs(console, args)
    elsewhere: list[str] = []
    given = dict.fromkeys(map(without_ending, args.prefixes))
    prefixes = [one for path in given for one in inspect.datasets_at(path, elsewhere.append)]
    if elsewhere:
        print(f"in other folders, to be named by themselves: {_few(elsewhere)}", file=sys.stderr)
    problems: dict[str, int] = {}
    entries, histograms = [], {}
    for prefix in prefixes:
        entry: dict[str, Any] = {"prefix": str(prefix)}
        if not args.json:
            console.print(Text(str(prefix), "bold"))
        if args.verify:
            entry["verification"] = found = _verified(prefix, tokenizer, args.vocab_size)
            problems |= {str(prefix): found["count"]} if found["count"] else {}
            if not args.json:
                _print_verification(console, found)
        if args.documents:
            dataset = inspect.open_dataset(prefix)
            own = None
            if not args.tokens:
                own = tokenizer or inspect.tokenizer_of(prefix, dataset.manifest)
            chosen = inspect.parse_documents(args.documents, dataset.documents)
            for number in chain.from_iterable(chosen):
                document = _document(dataset, number, own, args.limit)
                if args.json:
                    entry.setdefault("documents", []).append(_plain(document))
                else:
                    _print_document(console, document)
        if args.plot or not (args.documents or args.verify):
            facts, histogram = _summary(prefix)
            entry |= facts
            short = sum(one.name == prefix.name for one in prefixes) == 1
            histograms[prefix.name if short else str(prefix)] = histogram
            if not (args.json or args.documents or args.verify):
                _print_summary(console, facts, histogram)
        entries.append(entry)
    if args.plot:
        from megacode.report.document_lengths import plot_lengths  # matplotlib

        plot_lengths(histograms, args.plot)
        if not args.json:
            console.print(f"drawn: {args.plot}")
    if args.json:
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        print(text.encode(errors="backslashreplace").decode())
    if problems:
        total = sum(problems.values())
        raise UserError(
            f"{', '.join(problems)}: {total:,} problem{'s' * (total > 1)} found; "
            "copy it again, or tokenize it again"
        )
    return 0


def _show_pairs(console: Console, args: argparse.Namespace) -> int:
    """Files of pairs: how many of what, or some of them beside their candidates."""
    from megacode.corpus.pairs.records import read_pairs
    from megacode.report.pairs import print_pair

    for path in args.prefixes:
        pairs = list(read_pairs(path)) if args.documents else read_pairs(path)
        if isinstance(pairs, list):
            for number in chain.from_iterable(inspect.parse_documents(args.documents, len(pairs))):
                print_pair(console, pairs[number])
            continue
        counts = Counter((one.language, two.kind) for one in pairs for two in one.candidates)
        table = table_of(str(path), "language", "candidates", "count", left=2)
        for (language, kind), number in sorted(counts.items()):
            table.add_row(language, kind, f"{number:,}")
        print_table(console, table)
    return 0


# --- summary


def _summary(prefix: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Header, statistics and manifest of a dataset as plain data, and its `length_histogram`."""
    dataset = inspect.open_dataset(prefix)
    with progress_bar(f"counting {prefix.name}", dataset.documents, "documents") as advance:
        numbers = inspect.statistics(dataset, advance)
    manifest = dataset.manifest or {}
    run = manifest.get("run", {})
    edges = log_edges(1)
    lengths = ("mean", "median", "p90", "p99", "longest", "shortest")
    facts: dict[str, Any] = {
        "format version": 1,
        "shards": len(dataset.shards),
        "token type": sorted({shard.dtype.name for shard in dataset.shards}),
        "sequences": numbers.sequences,
        "documents": numbers.documents,
        "tokens": numbers.tokens,
        "file bytes": {
            ending: sum(
                with_ending(shard.prefix, ending).stat().st_size for shard in dataset.shards
            )
            for ending in (".bin", ".idx")
        },
        "tokens per document": {name: getattr(numbers, name) for name in lengths},
        "share of documents longer than": {
            str(limit): many / max(numbers.documents, 1) for limit, many in numbers.beyond.items()
        },
        "empty documents": numbers.empty,
        "histogram": {
            "edges": edges.tolist(),
            "documents": merged(numbers.histogram, edges)[0].tolist(),
        },
    }
    if all(has_marks(shard.prefix) for shard in dataset.shards):
        marks = TokenSource(prefix.name, [open_marks(shard) for shard in dataset.shards])
        if manifest.get("pairs"):
            facts["pairs as"] = manifest["pairs"]
            of_queries = count_trained(marks, "query")
            facts["tokens of queries"] = of_queries
            both = count_trained(marks, "equivalent")
            facts["tokens of equivalent candidates"] = both - of_queries
        else:
            facts["tokens of answers"] = count_trained(marks, "answers")
    if manifest.get("bytes") and numbers.tokens:
        facts["bytes per token"] = manifest["bytes"] / numbers.tokens
    if manifest:
        vocab_size = manifest.get("vocab_size")
        facts["tokenizer"] = {**manifest.get("tokenizer", {}), "vocab_size": vocab_size}
        # A dataset that is one of several names the settings of their run by a digest.
        facts["settings"] = run.get("settings") or {"digest": manifest.get("settings")}
        facts["inputs"] = run.get("inputs") or _inputs(prefix)
    return facts, numbers.histogram


def _inputs(prefix: Path) -> list[str]:
    try:
        return list(input_files(prefix))
    except (KeyError, TypeError, OSError, ValueError):
        return []


def _print_summary(console: Console, facts: Mapping[str, Any], histogram: np.ndarray) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name != "histogram":
            table.add_row(name, Text(_shown(value) or "-"))
    if "tokenizer" not in facts:
        table.add_row("manifest", "none: which tokenizer made it is not known")
    print_table(console, table)
    print_table(console, _histogram_table(histogram))


def _shown(value: Any) -> str:
    """A fact in one line: what is empty is left out, fingerprints and long lists are cut."""
    if isinstance(value, Mapping):
        skipped = ("tokenizer", "input files")  # of the settings: they have rows of their own
        parts = {key: _shown(one) for key, one in value.items() if key not in skipped}
        return ", ".join(f"{key} {part}" for key, part in parts.items() if part)
    if isinstance(value, (list, tuple)):
        return _few([_shown(one) for one in value])
    if isinstance(value, (bool, type(None))):
        return "" if value is None else json.dumps(value)
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", str(value))


def _few(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _histogram_table(histogram: np.ndarray) -> Table:
    """A row for each doubling of the length, from the shortest document to the longest."""
    edges = log_edges(1)
    documents, tokens = merged(histogram, edges)
    used = np.flatnonzero(documents)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("tokens", "documents", "share", "", "share of tokens"):
        table.add_column(name, justify="right" if name else "left", width=None if name else 40)
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


# --- documents


def _document(
    dataset: inspect.Dataset, number: int, tokenizer: Tokenizer | None, limit: int
) -> dict[str, Any]:
    """A document as {document, tokens, pieces, left out}, and without a tokenizer `ids`.

    `pieces` are (kind, text, whether it is an answer) of about `limit` characters; `left out` is ""
    where all is shown. `answers`: how many of the tokens read are answers, of conversations;
    `equivalent`: are of equivalent candidates, of pairs.
    """
    shard, first, tokens = dataset.span(number)
    # A character takes four tokens at most, the bytes of its UTF-8.
    ids = inspect.read_tokens(shard, first, min(tokens, 4 * limit)).tolist()
    out: dict[str, Any] = {"document": number, "tokens": tokens, "pieces": []}
    if tokenizer is None:
        text = " ".join(map(str, ids))
        if len(text) > limit:
            text = text[: limit + 1].rpartition(" ")[0]
        out["pieces"], out["ids"] = [("text", text, False)], ids[: len(text.split())]
        cut = len(out["ids"]) < tokens
    else:
        room = limit
        marks = inspect.read_marks(shard, first, len(ids))
        answers = [False] * len(ids)
        if marks is not None:
            pairs = bool((marks & ROLES).any())
            shown = (marks & EQUIVALENT) != 0 if pairs else trained(marks, "answers")
            answers = shown.tolist()
            out["equivalent" if pairs else "answers"] = sum(answers)
        for kind, text, answer in inspect.pieces_of_text(tokenizer, ids, answers):
            if room > 0:
                out["pieces"].append((kind, text[:room] if kind == "text" else text, answer))
            room -= len(text)
        cut = room < 0 or len(ids) < tokens
    return {**out, "left out": f"the rest is left out (--limit {limit})" if cut else ""}


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as it stands in JSON."""
    out = {key: document[key] for key in ("document", "tokens", "ids") if key in document}
    if "ids" not in out:
        out["text"] = "".join(text for _, text, _ in document["pieces"])
    for key in _GREEN.keys() & document.keys():
        runs = groupby(document["pieces"], key=lambda piece: piece[2])
        out[key] = ["".join(text for _, text, _ in run) for answer, run in runs if answer]
    return out | ({"left out": document["left out"]} if document["left out"] else {})


def _print_document(console: Console, document: Mapping[str, Any]) -> None:
    title = f"document {document['document']:,}: {document['tokens']:,} tokens"
    for key in _GREEN.keys() & document.keys():
        title += f", {document[key]:,} of them {_GREEN[key]} (green)"
    console.rule(Text(title, "dim"), align="left", style="dim")
    coloured = console.is_terminal and not console.no_color
    for kind, text, answer in document["pieces"]:  # `print` would make spaces of tabs
        style = f"{_STYLES[kind]} {_ANSWER if answer else ''}" if coloured else ""
        console.file.write(Style.parse(style).render(printable(text, "\t\n")))
    console.file.write("\n")
    if document["left out"]:
        console.print(Text(f"[{document['left out']}]", "dim italic"))


# --- verification


def _verified(prefix: Path, tokenizer: Tokenizer | None, vocab_size: int | None) -> dict[str, Any]:
    from megacode.corpus.verify import bytes_at, verify

    with progress_bar(f"verifying {prefix.name}", bytes_at(prefix)) as advance:
        result = verify(prefix, tokenizer, vocab_size, advance)
    return {**vars(result), "problems": list(result.problems), "unchecked": list(result.unchecked)}


def _print_verification(console: Console, result: Mapping[str, Any]) -> None:
    counts = f"{result['documents']:,} documents, {result['tokens']:,} tokens"
    console.print(Text(f"{counts}, highest id {result['highest']:,}", "dim"))
    for sentence in result["problems"]:
        console.print(Text.assemble(("wrong ", "bold red"), sentence), soft_wrap=True)
    if result["count"] > len(result["problems"]):
        console.print(f"and {result['count'] - len(result['problems']):,} more")
    for sentence in result["unchecked"]:
        console.print(Text.assemble(("not checked ", "yellow"), sentence), soft_wrap=True)
    if not result["count"]:
        limited = " in what was checked" if result["unchecked"] else ""
        console.print(Text(f"whole: nothing wrong{limited}", "green"))
