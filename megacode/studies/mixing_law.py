"""Losses as functions of the mixture, and the mixture that minimises them.

The law (Ye et al., arXiv 2403.16952) has for target i over domains j

    L_i(r) = c_i + k_i exp(sum_j t_ij r_j) = c_i + exp(sum_j a_ij r_j),

because shares sum to 1: exp(a_ij) is what target i loses above its floor c_i on domain j alone. It
has one parameter more than domains for each target. With more than about five domains, gradient
boosted trees need fewer runs (Liu et al., RegMix, arXiv 2407.01492).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.studies.mixing_table import MixtureTable

Floats = NDArray[np.float64]
Kind = Literal["law", "trees"]
LAW_DOMAINS = 5
"""More domains than these are fitted by trees unless told otherwise."""
_FLOORS = np.concatenate([np.linspace(0, 0.96, 25), 1 - np.logspace(-1.5, -4, 12)])
_DRAWS, _BEST = 100_000, 128


class LossModel(Protocol):
    """Predicts losses, float64 [rows, targets], from shares, [rows, domains]."""

    def predict(self, shares: Floats) -> Floats: ...


@dataclass(frozen=True, eq=False)
class MixingLaw:
    """Attributes: floors c, [targets]; logs a, [targets, domains]."""

    floors: Floats
    logs: Floats

    def predict(self, shares: Floats) -> Floats:
        return self.floors + np.exp(shares @ self.logs.T)


@dataclass(frozen=True, eq=False)
class Trees:
    """A LightGBM model for each target."""

    boosters: tuple[Any, ...]

    def predict(self, shares: Floats) -> Floats:
        return np.column_stack([booster.predict(shares) for booster in self.boosters])


def fit(shares: Floats, losses: Floats, kind: Kind) -> LossModel:
    """A model of losses, [rows, targets], by shares, [rows, domains].

    Raises:
        UserError: the law has more parameters than there are rows; LightGBM is not installed.
    """
    if kind == "trees":
        return _trees(shares, losses)
    needed = shares.shape[1] + 1
    if len(shares) < needed:
        raise UserError(
            f"the law of {shares.shape[1]} domains has {needed} parameters a target, and there are "
            f"{len(shares)} mixtures; train more, or merge domains"
        )
    laws = [_law(shares, column) for column in losses.T]
    return MixingLaw(np.array([c for c, _ in laws]), np.stack([logs for _, logs in laws]))


def _law(shares: Floats, losses: Floats) -> tuple[float, NDArray[Any]]:
    """(c, a) of least squares: a grid over c in [0, min L), with a by Gauss and Newton at each, and
    a finer one around the best."""
    least = float(losses.min())
    grid = _FLOORS
    for _ in range(3):
        found = [_at_floor(shares, losses, least * x) for x in grid]
        best = int(np.argmin([error for error, _ in found]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        floor, logs = least * grid[best], found[best][1]
        grid = np.linspace(low, high, 17)
    return floor, logs


def _at_floor(shares: Floats, losses: Floats, floor: float) -> tuple[float, NDArray[Any]]:
    """(sum of squared errors, a) with c given, from least squares on log(L - c)."""
    above = losses - floor

    def error(logs: NDArray[Any]) -> float:
        with np.errstate(over="ignore"):
            return float(((np.exp(shares @ logs) - above) ** 2).sum())

    # An error of log(L - c) is one of L over L - c.
    logs: NDArray[Any] = np.linalg.lstsq(
        shares * above[:, None], np.log(above) * above, rcond=None
    )[0]
    current = error(logs)
    for _ in range(20):
        fitted = np.exp(shares @ logs)
        step = np.linalg.lstsq(shares * fitted[:, None], above - fitted, rcond=None)[0]
        while (after := error(logs + step)) > current and np.abs(step).max() > 1e-9:
            step = step / 2
        if after >= current * (1 - 1e-10):
            break
        logs, current = logs + step, after
    return current, logs


def _trees(shares: Floats, losses: Floats) -> Trees:
    """RegMix's settings; a fifth of the rows says when to stop (RegMix looked at its test set)."""
    try:
        import lightgbm
    except ImportError as error:
        raise UserError(
            f"trees need LightGBM ({error}); pip install 'megacode[trees]', or take --kind law"
        ) from None
    settings = {"objective": "regression", "learning_rate": 0.01, "seed": 42, "verbosity": -1}
    settings |= {"num_threads": 1, "deterministic": True}
    settings |= {"min_data_in_leaf": max(2, min(20, len(shares) // 20))}
    held = np.arange(len(shares)) % 5 == 4
    boosters = []
    for target in losses.T:
        train = lightgbm.Dataset(shares[~held], target[~held])
        test = lightgbm.Dataset(shares[held], target[held], reference=train)
        stop = lightgbm.early_stopping(50, verbose=False)
        rounds = lightgbm.train(settings, train, 2000, valid_sets=[test], callbacks=[stop])
        whole = lightgbm.Dataset(shares, target)
        boosters.append(lightgbm.train(settings, whole, max(rounds.best_iteration, 1)))
    return Trees(tuple(boosters))


# ------------------------------------------------------------------------------------ the optimum


@dataclass(frozen=True, eq=False)
class Goal:
    """What a mixture minimises: sum_i w_i L_i(r) + kl KL(r || natural), with r <= most.

    Attributes:
        weights: w, [targets].
        natural: [domains], sums to 1.
        most: [domains], the largest share of each.
    """

    weights: Floats
    natural: Floats
    kl: float
    most: Floats

    def value(self, model: LossModel, shares: Floats) -> Floats:
        """[rows]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(shares > 0, np.log(shares / self.natural), 0.0)
        return model.predict(shares) @ self.weights + self.kl * (shares * ratio).sum(1)


def optimum(model: LossModel, goal: Goal) -> Floats:
    """The best shares, [domains].

    Of a law it is the minimum (the goal is convex), by mirror descent; of trees the mean of the
    best 128 of 100,000 mixtures drawn around the natural one, as RegMix does.

    Raises:
        UserError: the caps leave no mixture.
    """
    if goal.most.sum() < 1:
        raise UserError(
            f"the epoch caps let all domains together fill {goal.most.sum():.3g} of the tokens; "
            "lower --tokens or raise --max-epochs"
        )
    if isinstance(model, MixingLaw):
        return _descend(model, goal)
    drawn = _drawn(goal)
    best = np.argsort(goal.value(model, drawn), kind="stable")[:_BEST]
    return drawn[best].mean(0)


def _descend(law: MixingLaw, goal: Goal) -> Floats:
    weights = goal.weights[:, None] * law.logs
    shares = _within(goal.natural.copy(), goal.most)
    rate, current = 1.0, float(goal.value(law, shares[None])[0])
    for _ in range(2000):
        gradient = np.exp(shares @ law.logs.T) @ weights
        gradient = gradient + goal.kl * np.log(np.maximum(shares, 1e-300) / goal.natural)
        step = -rate * (gradient - gradient.min())
        moved = _within(shares * np.exp(step), goal.most)
        value = float(goal.value(law, moved[None])[0])
        if value > current:
            rate /= 2
            continue
        gained, shares, current = current - value, moved, value
        if gained < 1e-11:
            break
        rate *= 1.5
    return shares


def _within(shares: Floats, most: Floats) -> Floats:
    """Scaled to a sum of 1, with those that are above `most` there."""
    full = np.zeros(len(shares), dtype=bool)
    shares = shares / shares.sum()
    while (over := ~full & (shares > most)).any():
        full |= over
        rest = shares[~full].sum()
        left = 1 - most[full].sum()
        even = np.full((~full).sum(), left / max((~full).sum(), 1))
        shares[full] = most[full]
        shares[~full] = shares[~full] / rest * left if rest > 0 else even
    return shares


def _drawn(goal: Goal) -> Floats:
    """Mixtures within the caps, of Dirichlet distributions of several widths."""
    generator = np.random.default_rng(0)
    prior = goal.natural**0.5
    prior = np.maximum(prior / prior.sum(), 1e-4) * len(prior)
    widths = np.logspace(np.log10(0.1), np.log10(5), 10)
    drawn = np.concatenate([generator.dirichlet(w * prior, _DRAWS // 10) for w in widths])
    inside = drawn[(drawn <= goal.most).all(1)]
    if len(inside) >= _BEST:
        return inside
    return np.stack([_within(row, goal.most) for row in drawn])


# ---------------------------------------------------------------------------------- the whole thing


@dataclass(frozen=True, eq=False)
class Fit:
    """A model of a table's last step, with what it is worth.

    Attributes:
        table: means over seeds, a row a mixture.
        left_out: predictions for each mixture by a fit without it, [rows, targets].
        seeds: standard deviation between seeds, [targets], or None.
        shares: the optimum, [domains].
        without: optima of the fits without one mixture, [rows, domains].
    """

    table: MixtureTable
    kind: Kind
    model: LossModel
    left_out: Floats
    seeds: Floats | None
    shares: Floats
    without: Floats

    @property
    def errors(self) -> Floats:
        """Left out: predicted less measured, [rows, targets]."""
        return self.left_out - self.table.losses


def fit_table(rows: MixtureTable, goal: Goal, kind: Kind | None = None) -> Fit:
    """Fit the rows of one step, leave out every mixture once, and find the optimum.

    Raises:
        UserError: see `fit` and `optimum`; one mixture more is needed than for a fit.
    """
    table, seeds = rows.by_mixture()
    count = len(table.domains)
    kind = kind or ("law" if count <= LAW_DOMAINS else "trees")
    if kind == "law" and len(table.shares) < count + 2:
        raise UserError(
            f"there are {len(table.shares)} mixtures, and a law of {count} domains needs "
            f"{count + 2}: its {count + 1} parameters, and one to leave out; train more"
        )
    model = fit(table.shares, table.losses, kind)
    predictions, optima = [], []
    for row in range(len(table.shares)):
        others = np.arange(len(table.shares)) != row
        part = fit(table.shares[others], table.losses[others], kind)
        predictions.append(part.predict(table.shares[row : row + 1])[0])
        optima.append(optimum(part, goal))
    best = optimum(model, goal)
    return Fit(table, kind, model, np.stack(predictions), seeds, best, np.stack(optima))
