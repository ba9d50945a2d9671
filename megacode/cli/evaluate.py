"""The verb `evaluate`: a checkpoint's validation loss, or tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from megacode.cli.arguments import at_least
from megacode.errors import UserError
from megacode.recipe.schema import Recipe
from megacode.terminal import print_table, table_console

EXAMPLE = """examples:
  megacode evaluate runs/crystal-tiny
  megacode evaluate runs/crystal-tiny/checkpoints/step_00000110 --samples 500 --json
  megacode evaluate runs/crystal-tiny --harness arc_easy,hellaswag --limit 200
  megacode evaluate exported --harness my_task --harness-tasks tasks/ --trust-remote-code"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "checkpoint", type=Path, help="run or checkpoint; with --harness a Hugging Face folder, too"
    )
    add("--samples", type=at_least(1), help="sequences per source (default: the recipe's)")
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
    from megacode.megatron.inference import open_for_inference

    recipe, tokenizer, model = open_for_inference(args.checkpoint)

    from megacode.data.planning import plan_with_data
    from megacode.evaluate.validation import Validation, by_domain
    from megacode.megatron.distributed import current_world, shutdown
    from megacode.run.checkpoints import find_checkpoint, read_info

    if args.samples:
        recipe = _with_samples(recipe, args.samples)
    checkpoint = find_checkpoint(args.checkpoint)
    plan = plan_with_data(recipe, checkpoint / "recipe.yaml")
    world = current_world()
    validation = Validation.open(plan, world, tokenizer)
    if validation is None:
        raise UserError(
            f"{args.checkpoint}: its recipe gives no source a `validation` set; "
            "there is nothing to evaluate on"
        )
    step = int(read_info(checkpoint)["step"])
    losses = validation.losses([model], step)
    domains = by_domain(recipe, losses)
    shutdown()
    if args.json:
        found = {
            "step": step,
            "loss_by_source": {name: loss for name, (loss, _) in losses.items()},
            "tokens_by_source": {name: tokens for name, (_, tokens) in losses.items()},
            "loss_by_domain": domains,
        }
        print(json.dumps(found))
    else:
        table = _table(recipe, losses, domains)
        table.title = f"{recipe.name}, step {step:,}: validation"
        print_table(table_console(), table)
    return 0


def _with_samples(recipe: Recipe, samples: int) -> Recipe:
    """The recipe with this number of validation samples for each source."""
    evaluation = recipe.evaluation.model_copy(update={"samples": samples})
    sources = {
        name: source.model_copy(update={"validation_samples": None})
        for name, source in recipe.sources.items()
    }
    return recipe.model_copy(update={"evaluation": evaluation, "sources": sources})


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


def _table(
    recipe: Recipe, losses: Mapping[str, tuple[float, int]], domains: Mapping[str, float]
) -> Table:
    table = Table("source", "domain", title_justify="left")
    for head in ("tokens", "loss (nats/token)", "perplexity"):
        table.add_column(head, justify="right")
    rows = [
        (name, recipe.sources[name].domain, f"{n:,}", loss) for name, (loss, n) in losses.items()
    ]
    totals = [("all", domain, "", loss) for domain, loss in domains.items()]
    for part in (rows, totals):
        for *words, loss in part:
            table.add_row(*words, f"{loss:.4f}", f"{math.exp(min(loss, 700)):,.2f}")
        table.add_section()
    return table
