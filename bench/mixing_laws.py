#!/usr/bin/env python3
"""Mixing laws on the tables that their authors published: errors of left-out mixtures, and rank
correlation on unseen ones.

    git clone https://github.com/yegcjs/mixinglaws && git clone https://github.com/sail-sg/regmix
    bench/mixing_laws.py --mixinglaws mixinglaws --regmix regmix

Measured: docs/results/mixing-laws.md
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from megacode.studies.mixing_law import Kind, fit
from megacode.studies.mixing_table import Floats


def of_mixing_laws(path: Path, last: int) -> tuple[list[str], Floats, Floats]:
    """(targets, shares, losses) at step `last` of a file of lines `CHECKPOINT DATA LOSS`; a
    checkpoint is .../NAME-SHARE-SHARE.../STEP."""
    losses: dict[tuple[float, ...], dict[str, float]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        checkpoint, data, loss = line.split()
        *_, name, step = checkpoint.strip("/").split("/")
        if step == str(last):
            shares = tuple(map(float, name.split("-")[1:]))
            losses[shares][data.split(".")[-2]] = float(loss)
    targets = sorted(set.intersection(*(set(row) for row in losses.values())))
    mixtures = sorted(losses)
    values = [[losses[mixture][target] for target in targets] for mixture in mixtures]
    return targets, np.array(mixtures), np.array(values)


def left_out(shares: Floats, losses: Floats) -> Floats:
    rows = []
    for row in range(len(shares)):
        others = np.arange(len(shares)) != row
        rows.append(fit(shares[others], losses[others], "law").predict(shares[row : row + 1])[0])
    return np.abs(np.stack(rows) - losses)


def of_regmix(folder: Path, name: str) -> tuple[list[str], Floats]:
    with (folder / "data" / f"{name}.csv").open() as file:
        head, *rows = list(csv.reader(file))
    return head[1:], np.array([[float(cell) for cell in row[1:]] for row in rows])


def ranks(values: Floats) -> Floats:
    return np.argsort(np.argsort(values)).astype(float)


def correlations(
    kind: Kind | str, train: tuple[Floats, Floats], test: tuple[Floats, Floats]
) -> Floats:
    """Spearman's rho of each target."""
    if kind == "linear":
        solution = np.linalg.lstsq(train[0], train[1], rcond=None)[0]
        predicted = test[0] @ solution
    else:
        predicted = fit(*train, "law" if kind == "law" else "trees").predict(test[0])
    pairs = zip(predicted.T, test[1].T, strict=True)
    return np.array([np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixinglaws", type=Path, help="checkout of yegcjs/mixinglaws")
    parser.add_argument("--regmix", type=Path, help="checkout of sail-sg/regmix")
    parser.add_argument(
        "--draws", type=int, default=5, help="random subsets of proxies for each size"
    )
    args = parser.parse_args()
    if args.mixinglaws:
        last = 30_000
        for name in ("2Mix/70M", "2Mix/160M"):
            targets, shares, losses = of_mixing_laws(args.mixinglaws / f"data/{name}.txt", last)
            errors = left_out(shares, losses)
            inside = (shares > shares.min(0)).all(1) & (shares < shares.max(0)).all(1)
            print(f"{name}, step {last}: {len(shares)} mixtures of {shares.shape[1]} domains")
            for column, target in enumerate(targets):
                inner, ends = errors[inside, column], errors[~inside, column]
                print(
                    f"  {target:20s} inside {inner.min():.4f} to {inner.max():.4f}, "
                    f"at ends {ends.min():.4f} to {ends.max():.4f} nats"
                )
    if args.regmix:
        _, shares = of_regmix(args.regmix, "train_mixture_1m")
        targets, losses = of_regmix(args.regmix, "train_pile_loss_1m")
        test = (
            of_regmix(args.regmix, "test_mixture_1m")[1],
            of_regmix(args.regmix, "test_pile_loss_1m")[1],
        )
        print(
            f"regmix: {shares.shape[1]} domains, {len(targets)} targets, {len(test[0])} unseen mixtures"
        )
        for count in (34, 68, 512):
            draws = 1 if count == len(shares) else args.draws
            for kind in ("trees", "law", "linear"):
                found = []
                for draw in range(draws):
                    rows = np.random.default_rng(draw).permutation(len(shares))[:count]
                    found.append(correlations(kind, (shares[rows], losses[rows]), test))
                means = np.mean(found, axis=1)
                print(
                    f"  {count} proxies, {kind:6s}: rho {np.mean(means):.3f} (draws {means.min():.3f} to {means.max():.3f})"
                )


if __name__ == "__main__":
    main()
