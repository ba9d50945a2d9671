"""The verb `mix fit`: which mixture, from the losses of runs with several."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode.cli.arguments import at_least
from megacode.errors import UserError
from megacode.recipe.section import parse_count
from megacode.terminal import print_table, table_console, table_of

if TYPE_CHECKING:
    from megacode.studies.mixing_law import Fit, Goal
    from megacode.studies.mixing_table import MixtureTable

EXAMPLE = """examples:
  megacode mix fit mixtures.csv --plot mixtures.png
  megacode mix fit mixtures.csv --weights code=1,text=1 --kl 0.05 --sizes code=1B,text=4B \\
    --tokens 8B --max-epochs 4
  megacode mix fit mixtures.csv --stages 3 --recipe recipes/crystal-tiny.yaml --phase phase2 \\
    --output mixed.yaml
  megacode plan mixed.yaml

A table has columns share.DOMAIN and loss.TARGET, perhaps `step`; rows with the same shares are
seeds. A folder of runs is read from their plans and validation losses."""


def _numbers(text: str) -> dict[str, float]:
    """`code=1,text=2` -> {code: 1, text: 2}; numbers as counts (1.2B) too."""
    out = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        try:
            number = float(parse_count(value))
        except ValueError:
            number = -1.0
        if not name or not equals or number < 0:
            raise argparse.ArgumentTypeError(f"expected NAME=NUMBER,NAME=NUMBER, not {text}")
        out[name] = number
    return out


def _count(text: str) -> int:
    if not re.match(r"\d", text):
        raise argparse.ArgumentTypeError(f"expected a count such as 8B, not {text}")
    return int(parse_count(text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    about = "fit losses by mixture, show errors on left-out mixtures, and find the best mixture"
    fit = actions.add_parser("fit", help=about, description=about, epilog=EXAMPLE)
    fit.formatter_class = parser.formatter_class
    add = fit.add_argument
    add("table", type=Path, help="table (.csv, .jsonl), a sweep's file, or a folder of runs")
    add("--kind", choices=("law", "trees"), help="(law; trees with more than 5 domains)")
    named = "NAME=NUMBER,..."
    add("--weights", type=_numbers, metavar=named, help="of targets in the goal; default: 1 each")
    add(
        "--kl",
        type=at_least(0, float),
        default=0.0,
        metavar="X",
        help="times KL to the natural mix",
    )
    add("--natural", type=_numbers, metavar=named, help="natural mix; default: --sizes")
    add("--sizes", type=_numbers, metavar=named, help="tokens that there are of domains")
    add("--tokens", type=_count, metavar="N", help="tokens of the run that the mixture is for")
    add("--max-epochs", type=at_least(0, float), default=4.0, metavar="X", help="of each domain")
    add("--stages", type=at_least(1), default=1, metavar="N", help="mixtures over the run's course")
    add("--plot", type=Path, metavar="FILE", help="draw losses against a share (.png, .svg)")
    add("--axis", metavar="DOMAIN", help="of the plot; default: code, else the first")
    add("--recipe", type=Path, help="recipe that --output extends")
    add("--phase", metavar="NAME", help="its phase that gets the mixture; default: the last")
    add("--output", type=Path, metavar="FILE", help="write a recipe with the mixture")
    add("--json", action="store_true", help="print as JSON instead")


def run(args: argparse.Namespace) -> int:
    from megacode.studies.mixing_law import fit_table
    from megacode.studies.mixing_table import read_table

    if bool(args.output) != bool(args.recipe):
        raise UserError("--output: goes with --recipe, the recipe that it extends; give both")
    table = read_table(args.table)
    goal = _goal(args, table)
    ends = _stage_ends(args, table)
    fits = [fit_table(table.at(step), goal, args.kind) for step in ends]
    last = fits[-1]
    if args.plot:
        from megacode.studies.mixing_plot import plot_fit  # matplotlib

        axis = args.axis or ("code" if "code" in table.domains else table.domains[0])
        if axis not in table.domains:
            raise UserError(f"--axis {axis}: is no domain; there are: {', '.join(table.domains)}")
        plot_fit(last, axis, args.plot)
    lines = list(table.left_out)
    if args.output:
        lines.append(_write(args, fits, ends))
    if args.json:
        print(json.dumps([_as_dict(fit, step) for fit, step in zip(fits, ends, strict=True)]))
        return 0
    console = table_console()
    _print(console, fits, ends, goal, args)
    for line in [*lines, *_warnings(last)]:
        console.print(line)
    if args.plot:
        console.print(f"drawn: {args.plot}")
    return 0


def _goal(args: argparse.Namespace, table: MixtureTable) -> Goal:
    import numpy as np

    from megacode.studies.mixing_law import Goal

    def of(option: str, names: tuple[str, ...], missing: float | None = None) -> Any:
        given = getattr(args, option)
        unknown = set(given) - set(names)
        absent = set(names) - set(given)
        if unknown or (absent and missing is None):
            wrong = f"{', '.join(sorted(unknown or absent))}"
            raise UserError(
                f"--{option} {'has' if unknown else 'lacks'} {wrong}; the table has: "
                f"{', '.join(names)}"
            )
        return np.array([given.get(name, missing) for name in names], float)

    count = len(table.domains)
    weights = np.ones(len(table.targets))
    if args.weights:
        weights = of("weights", table.targets, 0.0)
    natural, most = np.full(count, 1 / count), np.ones(count)
    given = args.natural or args.sizes
    if given:
        natural = of("natural" if args.natural else "sizes", table.domains)
        if not (natural > 0).all():
            raise UserError("--natural: every domain needs more than 0")
        natural = natural / natural.sum()
    elif args.kl:
        raise UserError("--kl: needs the natural mix; give --natural or --sizes")
    if bool(args.sizes) != bool(args.tokens):
        raise UserError("--sizes and --tokens: caps of epochs need both; give both, or none")
    if args.sizes:
        most = np.minimum(of("sizes", table.domains) * args.max_epochs / args.tokens, 1.0)
    return Goal(weights, natural, args.kl, most)


def _stage_ends(args: argparse.Namespace, table: MixtureTable) -> list[int]:
    """The steps of the table at which stages end."""
    steps = sorted(set(table.steps.tolist()))
    if args.stages > len(steps):
        raise UserError(
            f"--stages {args.stages}: the table has {len(steps)} step{'s' * (len(steps) > 1)}; "
            "lower it, or give losses at more steps (column `step`)"
        )
    wanted = [steps[-1] * (number + 1) / args.stages for number in range(args.stages)]
    ends = [min(steps, key=lambda step, at=at: abs(step - at)) for at in wanted]  # type: ignore[misc]
    if len(set(ends)) < len(ends):
        raise UserError(f"--stages {args.stages}: the table's steps are too far apart; lower it")
    return ends


def _write(args: argparse.Namespace, fits: list[Fit], ends: list[int]) -> str:
    from megacode.recipe.load import load_recipe
    from megacode.studies.mixing_phases import write_phases

    phase = args.phase or load_recipe(args.recipe).phases[-1].name
    stages = [
        (
            end / ends[-1] if len(ends) > 1 else 1.0,
            dict(zip(f.table.domains, f.shares.tolist(), strict=True)),
        )
        for f, end in zip(fits, ends, strict=True)
    ]
    steps = write_phases(args.recipe, phase, stages, args.output)
    return f"{args.output}: {phase} in {len(steps)} pieces of {', '.join(map(str, steps))} steps"


def _as_dict(fit: Fit, step: int) -> dict[str, Any]:
    table = fit.table
    return {
        "step": step,
        "kind": fit.kind,
        "mixtures": len(table.shares),
        "left_out": {
            name: {"mean": float(abs(e).mean()), "worst": float(abs(e).max())}
            for name, e in zip(table.targets, fit.errors.T, strict=True)
        },
        "optimum": dict(zip(table.domains, fit.shares.tolist(), strict=True)),
        "losses": dict(
            zip(table.targets, fit.model.predict(fit.shares[None])[0].tolist(), strict=True)
        ),
    }


def _print(
    console: Any, fits: list[Fit], ends: list[int], goal: Goal, args: argparse.Namespace
) -> None:
    fit, table = fits[-1], fits[-1].table
    what = "mixing law" if fit.kind == "law" else "trees"
    at = f", step {ends[-1]:,}" if ends[-1] else ""
    columns = (
        "loss on",
        "measured",
        "error left out: mean",
        "worst",
        "between seeds",
        "at the optimum",
    )
    shown = table_of(f"{what} of {len(table.shares)} mixtures{at}", *columns)
    best = fit.model.predict(fit.shares[None])[0]
    for column, target in enumerate(table.targets):
        losses, errors = table.losses[:, column], abs(fit.errors[:, column])
        seeds = "one seed" if fit.seeds is None else f"{fit.seeds[column]:.4f}"
        span = f"{losses.min():.4f} to {losses.max():.4f}"
        shown.add_row(
            target,
            span,
            f"{errors.mean():.4f}",
            f"{errors.max():.4f}",
            seeds,
            f"{best[column]:.4f}",
        )
    print_table(console, shown)
    caps = [f"{args.max_epochs:g} epochs at most"] if args.sizes else []
    kl = [f"KL x {args.kl:g} to the natural mix"] if args.kl else []
    title = ", ".join(["Best mixture", *kl, *caps])
    stages = [f"stage to {end:,}" for end in ends] if len(ends) > 1 else ["share"]
    epochs = ["epochs"] * bool(args.sizes)
    mixture = table_of(title, "domain", "trained", *stages, "without one mixture", *epochs)
    for column, domain in enumerate(table.domains):
        trained, without = table.shares[:, column], fit.without[:, column]
        row = [domain, f"{100 * trained.min():.1f} to {100 * trained.max():.1f} %"]
        row += [f"{100 * one.shares[column]:.1f} %" for one in fits]
        row.append(f"{100 * without.min():.1f} to {100 * without.max():.1f} %")
        if args.sizes:
            row.append(f"{fit.shares[column] * args.tokens / args.sizes[domain]:.3g}")
        mixture.add_row(*row)
    print_table(console, mixture)


def _warnings(fit: Fit) -> list[str]:
    table = fit.table
    return [
        f"note: {100 * share:.1f} % {domain} lies beyond the trained mixtures; train one there"
        for domain, share, trained in zip(table.domains, fit.shares, table.shares.T, strict=True)
        if not trained.min() - 0.005 <= share <= trained.max() + 0.005
    ]
