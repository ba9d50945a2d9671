"""The verb `evaluate`: validation loss of a checkpoint, by source and domain; or tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacode.recipe.schema import Recipe

EXAMPLE = """examples:
  megacode evaluate runs/crystal-tiny
  megacode evaluate runs/crystal-tiny/checkpoints/step_00000110 --samples 500 --json
  megacode evaluate runs/crystal-tiny --harness arc_easy,hellaswag --limit 200
  megacode evaluate exported --harness my_task --harness-tasks tasks/ --trust-remote-code"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="run folder or checkpoint folder; with --harness a Hugging Face folder, too",
    )
    parser.add_argument("--samples", type=int, help="sequences per source (default: the recipe's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--harness",
        metavar="TASKS",
        help="tasks of lm-evaluation-harness, with commas between them",
    )
    parser.add_argument(
        "--harness-tasks",
        type=Path,
        metavar="FOLDER",
        help="further tasks as YAML files; no network",
    )
    parser.add_argument(
        "--shots", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="questions of each task (default: all)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=8,
        help="texts in a forward pass (default: 8)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --harness: run the Python files of a Hugging Face folder",
    )


def run(args: argparse.Namespace) -> int:
    if args.harness is not None:
        return _run_harness(args)
    from megacode.errors import UserError
    from megacode.megatron.inference import open_for_inference

    if args.trust_remote_code:
        raise UserError(
            "--trust-remote-code: is for --harness on a Hugging Face folder; leave it out"
        )
    if args.samples is not None and args.samples < 1:
        raise UserError(f"--samples: expected 1 or more, not {args.samples}")
    recipe, tokenizer, model = open_for_inference(args.checkpoint)

    from megacode.data.planning import plan_with_data
    from megacode.evaluate.validation import Validation, by_domain, validate
    from megacode.megatron.distributed import current_world, shutdown
    from megacode.run.checkpoints import find_checkpoint, read_info

    if args.samples:
        each = {"samples": args.samples}
        recipe = recipe.model_copy(
            update={
                "evaluation": recipe.evaluation.model_copy(update=each),
                "sources": {
                    k: v.model_copy(update={"validation_samples": None})
                    for k, v in recipe.sources.items()
                },
            }
        )
    checkpoint = find_checkpoint(args.checkpoint)
    plan = plan_with_data(recipe, checkpoint / "recipe.yaml")
    world = current_world()
    validation = Validation.open(plan, world, tokenizer)
    if validation is None:
        raise UserError(
            f"{args.checkpoint}: its recipe gives no source a `validation` set; there is nothing to evaluate on"
        )
    info = read_info(checkpoint)
    losses = validate(validation, [model], plan, int(info["step"]), world)
    domains = by_domain(recipe, losses)
    shutdown()
    if args.json:
        print(
            json.dumps(
                {
                    "step": info["step"],
                    "loss_by_source": {name: loss for name, (loss, _) in losses.items()},
                    "tokens_by_source": {name: tokens for name, (_, tokens) in losses.items()},
                    "loss_by_domain": domains,
                }
            )
        )
        return 0
    _print_table(recipe, info, losses, domains)
    return 0


def _run_harness(args: argparse.Namespace) -> int:
    from megacode.errors import UserError
    from megacode.evaluate.harness import TaskSettings, print_results, run_tasks
    from megacode.megatron.distributed import shutdown

    tasks = [name.strip() for name in args.harness.split(",") if name.strip()]
    if not tasks:
        raise UserError("--harness: names no task; give at least one, such as --harness arc_easy")
    for option, value, least in (
        ("shots", args.shots, 0),
        ("limit", args.limit, 1),
        ("batch-size", args.batch_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{option}: expected {least} or more, not {value}")
    settings = TaskSettings(
        tasks, args.harness_tasks, args.shots, args.limit, args.batch_size, args.trust_remote_code
    )
    try:
        results = run_tasks(args.checkpoint, settings)
    finally:
        shutdown()
    if args.json:
        print(json.dumps(results))
    else:
        print_results(str(args.checkpoint), results)
    return 0


def _print_table(
    recipe: Recipe,
    info: dict[str, Any],
    losses: dict[str, tuple[float, int]],
    domains: dict[str, float],
) -> None:
    import math

    from rich.table import Table

    from megacode.terminal import print_table, table_console

    table = Table(title=f"{recipe.name}, step {info['step']:,}: validation", title_justify="left")
    table.add_column("source")
    table.add_column("domain")
    for head in ("tokens", "loss (nats/token)", "perplexity"):
        table.add_column(head, justify="right")
    for name, (loss, tokens) in losses.items():
        table.add_row(
            name,
            recipe.sources[name].domain,
            f"{tokens:,}",
            f"{loss:.4f}",
            f"{math.exp(min(loss, 700)):,.2f}",
        )
    table.add_section()
    for domain, loss in domains.items():
        table.add_row("all", domain, "", f"{loss:.4f}", f"{math.exp(min(loss, 700)):,.2f}")
    print_table(table_console(), table)
