"""The verb `evaluate`: checkpoints' validation losses and scores of tasks."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track
from rich.table import Table

from megacode.cli.arguments import at_least
from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Recipe
from megacode.run.checkpoints import INFO, complete_checkpoints, find_checkpoint
from megacode.run.evaluations import FOLDER, add_to_curve, items_folder
from megacode.terminal import count, print_table, table_console, table_of

if TYPE_CHECKING:
    from megacode.evaluate.scoring import TaskResult

EXAMPLE = """examples:
  megacode evaluate runs/crystal-tiny
  megacode evaluate runs/crystal-tiny/checkpoints/step_00000110 --samples 500 --json
  megacode tasks make brackets copying --seed 1 --items 60 --out tasks
  megacode evaluate runs/crystal-tiny --tasks tasks/brackets.yaml tasks/copying.yaml
  megacode evaluate runs/crystal-tiny --all-checkpoints --samples 8
  megacode evaluate runs/crystal-tiny --harness arc_easy,hellaswag --limit 200
  megacode evaluate exported --harness my_task --harness-tasks tasks/ --trust-remote-code

With --all-checkpoints RUN/evaluations gets checkpoints.jsonl and checkpoints.png, the curve
over its tokens, which `megacode report` shows too. docs/tasks.md says what a task is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint", type=Path, help="run, checkpoint, or (--tasks, --harness) Hugging Face folder"
    )
    add("--samples", type=at_least(1), help="sequences per source (default: the recipe's)")
    add("--tasks", type=Path, nargs="+", metavar="YAML", help="tasks, or folders (the recipe's)")
    add("--out", type=Path, metavar="FOLDER", help="items' scores, and pictures of LECS tasks")
    add("--all-checkpoints", action="store_true", help="every checkpoint of a run: a curve")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--harness", metavar="TASKS", help="tasks of lm-evaluation-harness, split by commas")
    add("--harness-tasks", type=Path, metavar="FOLDER", help="more tasks, as YAML; no network")
    add("--shots", type=at_least(0), metavar="N", help="examples before each question (the task's)")
    add("--limit", type=at_least(1), metavar="N", help="questions of each task (all)")
    add("--batch-size", type=at_least(1), metavar="N", default=8, help="texts in a forward pass")
    add("--trust-remote-code", action="store_true", help="run the folder's own Python files")


def run(args: argparse.Namespace) -> int:
    if args.harness is not None:
        return _run_harness(args)
    if args.trust_remote_code:
        raise UserError(
            "--trust-remote-code: is for --harness on a Hugging Face folder; leave it out"
        )
    if args.out and args.all_checkpoints:
        raise UserError("--out: RUN/evaluations has the items of all checkpoints; leave it out")
    with contextlib.ExitStack() as stack:
        return _evaluate(args, stack)


def _evaluate(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    checkpoints = [_checkpoint(args, stack)]
    if args.all_checkpoints:
        checkpoints = [path for _, path in complete_checkpoints(args.checkpoint / "checkpoints")]
        if not checkpoints:
            raise UserError(f"--all-checkpoints: {args.checkpoint} is no run's folder; give one")
    recipe = load_recipe(checkpoints[-1] / "recipe.yaml")

    from megacode.megatron import cpu

    cpu.prepare()
    from megacode.evaluate.checkpoints import evaluate_checkpoints
    from megacode.evaluate.scoring import check_tasks, write_results
    from megacode.evaluate.tasks import open_tasks
    from megacode.megatron.distributed import shutdown

    tasks = open_tasks(args.tasks or recipe.evaluation.tasks)
    check_tasks(tasks)
    records: list[dict[str, Any]] = []
    results: list[TaskResult] = []
    found = evaluate_checkpoints(checkpoints, tasks, args.samples)
    hidden = len(checkpoints) == 1 or args.json
    for record, results in track(found, "checkpoints", len(checkpoints), disable=hidden):
        records.append(record)
        for result in () if args.all_checkpoints else results:
            record["tasks"][result.task.task.name]["intervals"] = _intervals(result)
        if args.out:
            write_results(args.out, results)
        if args.all_checkpoints:
            write_results(items_folder(args.checkpoint, record["step"]), results)
            add_to_curve(args.checkpoint, record)
    shutdown()
    if args.json:
        for record in records:
            print(json.dumps(record))
    elif args.all_checkpoints:
        print_table(table_console(), _curve(recipe.name, records))
    else:
        _print(recipe, records[0])
    if args.out:
        for picture in _draw_selections(results, args.out):
            print(f"picture: {picture}", file=sys.stderr if args.json else sys.stdout)
    if args.all_checkpoints and (path := _draw(args.checkpoint)) and not args.json:
        print(f"curve: {path}")
    return 0


def _checkpoint(args: argparse.Namespace, stack: contextlib.ExitStack) -> Path:
    """The one that is named; of a Hugging Face folder one that is there until `stack` ends."""
    folder: Path = args.checkpoint
    if not (folder / "config.json").is_file() or (folder / INFO).is_file():
        return find_checkpoint(folder)
    if not args.tasks or args.all_checkpoints:
        raise UserError(f"{folder}: a Hugging Face folder is asked --tasks or --harness; give one")
    from megacode.convert.importing import Found, import_model
    from megacode.convert.tokenizer_files import has_tokenizer, read_tokenizer

    out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megacode-"))) / "imported"
    found = Found.open(folder)
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: has no tokenizer.json or tokenizer.model, which --tasks need")
    import_model(found, out, read_tokenizer(folder.resolve(), found.vocab_size)[0])
    return out


def _print(recipe: Recipe, record: Mapping[str, Any]) -> None:
    if "loss_by_source" in record:
        table = _validation(recipe, record)
        table.title = f"{recipe.name}, step {record['step']:,}: validation"
        print_table(table_console(), table)
    if tasks := record.get("tasks"):
        title = f"{recipe.name}, step {record['step']:,}: tasks"
        table = table_of(title, "task", "group", "items", "accuracy", "more", left=2)
        for name, numbers in tasks.items():
            more = [f"{k} {v:.4g}" for k, v in numbers.items() if k not in _NOT_MORE]
            between = numbers["intervals"]
            accuracy = _with_interval(numbers["accuracy"], between[""])
            table.add_row(name, "", f"{numbers['items']:,}", accuracy, ", ".join(more))
            for group, value in numbers.get("groups", {}).items():
                table.add_row("", group, "", _with_interval(value, between[group]), "")
        print_table(table_console(), table)


_NOT_MORE = "accuracy", "items", "groups", "intervals"


def _with_interval(value: float, between: Sequence[float] | None) -> str:
    return f"{value:.4f} ({between[0]:.3f} to {between[1]:.3f})" if between else f"{value:.4f}"


def _intervals(result: TaskResult) -> dict[str, list[float] | None]:
    """95 %, over items by cluster: of all ("") and of each group; None of a single cluster."""
    names: dict[str, str | None] = {"": None, **{group: group for group in result.groups}}
    found = {name: result.interval(group) for name, group in names.items()}
    return {n: None if math.isnan(i.low) else [i.low, i.high] for n, i in found.items()}


def _draw_selections(results: Sequence[TaskResult], folder: Path) -> Iterator[Path]:
    """Pictures of the LECS tasks."""
    from megacode.report.selection import BETWEEN, Cell, draw_selection

    for result in results:
        if result.task.task.lecs is None:
            continue
        groups = [item.group for item in result.task.items]
        cells = []
        for group in dict.fromkeys(groups):
            given = [one for one, own in zip(result.given, groups, strict=True) if own == group]
            equivalent, other = group.split(BETWEEN)
            cells.append(Cell(equivalent, other, result.interval(group), given))
        path = folder / f"{result.task.task.name}.png"
        draw_selection(result.task.task.name, cells, path)
        yield path


def _curve(name: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """A row a checkpoint: losses by domain, bits per byte, and scores."""
    domains = list(records[-1].get("loss_by_domain", {}))
    sized = list(records[-1].get("bits_per_byte_by_domain", {}))
    tasks = list(records[-1].get("tasks", {}))
    heads = [*(f"loss {d}" for d in domains), *(f"bits/byte {d}" for d in sized), *tasks]
    table = table_of(f"{name}: checkpoints", "step", "tokens", "phase", *heads, left=0)
    for record in records:
        values = [record.get("loss_by_domain", {}).get(domain) for domain in domains]
        values += [record.get("bits_per_byte_by_domain", {}).get(domain) for domain in sized]
        values += [record.get("tasks", {}).get(task, {}).get("accuracy") for task in tasks]
        cells = ["–" if value is None else f"{value:.4f}" for value in values]
        tokens = count(record["tokens"]) if record["tokens"] else "–"
        table.add_row(f"{record['step']:,}", tokens, str(record["phase"]), *cells)
    return table


def _draw(run: Path) -> Path | None:
    """The curve's file; None where there is nothing to draw."""
    from megacode.report.drawing import save
    from megacode.report.figures import scores
    from megacode.report.palette import domain_colours
    from megacode.report.run_data import read_run

    data = read_run(run)
    path = run / FOLDER / "checkpoints.png"
    figure = scores(data, domain_colours(list(data.domains)))
    if figure is None:
        return None
    save(figure, path)
    return path


def _run_harness(args: argparse.Namespace) -> int:
    from megacode.evaluate.harness import print_results, run_tasks
    from megacode.megatron.distributed import shutdown

    tasks = [name.strip() for name in args.harness.split(",") if name.strip()]
    if not tasks:
        raise UserError("--harness: names no task; give at least one, such as --harness arc_easy")
    try:
        results = run_tasks(
            args.checkpoint,
            tasks,
            folder=args.harness_tasks,
            shots=args.shots,
            limit=args.limit,
            batch_size=args.batch_size,
            trust_remote_code=args.trust_remote_code,
        )
    finally:
        shutdown()
    if args.json:
        print(json.dumps(results))
    else:
        print_results(str(args.checkpoint), results)
    return 0


def _validation(recipe: Recipe, record: Mapping[str, Any]) -> Table:
    table = Table("source", "domain", title_justify="left")
    for head in ("tokens", "loss (nats/token)", "perplexity", "bits/byte"):
        table.add_column(head, justify="right")
    rows = [
        (name, recipe.sources[name].domain, f"{record['tokens_by_source'][name]:,}", loss, bits)
        for name, loss in record["loss_by_source"].items()
        for bits in [record["bits_per_byte_by_source"].get(name)]
    ]
    totals = [
        ("all", domain, "", loss, record["bits_per_byte_by_domain"].get(domain))
        for domain, loss in record["loss_by_domain"].items()
    ]
    for part in (rows, totals):
        for *words, loss, bits in part:
            size = "–" if bits is None else f"{bits:.4f}"
            table.add_row(*words, f"{loss:.4f}", f"{math.exp(min(loss, 700)):,.2f}", size)
        table.add_section()
    return table
