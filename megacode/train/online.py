"""Shares that are decided while training: the losses of a block become the shares of the next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacode.files import write_text
from megacode.megatron.distributed import World
from megacode.plan.plan import PhasePlan, Plan
from megacode.plan.trajectory import FILE, entry_line, next_boundary, read_entries
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.online import (
    decides,
    known_shares,
    next_rewards,
    next_shares,
    with_shares,
)


class OnlineMixing:
    """The algorithm's state on every rank; rank 0 records the shares in RUN/mixture.jsonl.

    The sums of a step's losses over the ranks are added up in the order of the steps, so a run that
    was stopped inside a block goes on bit for bit.

    Args:
        done: finished steps that this start goes on after; records of later blocks are dropped.
        facts: that the checkpoint has of `facts`.
    """

    def __init__(
        self,
        run: Path,
        plan: Plan,
        world: World,
        done: int,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._world = run / FILE, world
        self._rewards = list(facts["rewards"]) if facts else []
        self._sums = np.array(facts["sums"] if facts else 0.0)
        self._pending: list[Tensor] = []
        self._recorded = 0
        if world.is_main and (entries := read_entries(run)):
            # The block that begins now was decided before, unless its phase begins too.
            begins = any(phase.first_step == done and _begins(plan, phase) for phase in plan.phases)
            kept = [entry for entry in entries if entry["step"] <= done + (not begins)]
            self._recorded = max((entry["step"] for entry in kept), default=0)
            write_text(self._path, "".join(map(entry_line, kept)))

    def begin(self, plan: Plan, phase: PhasePlan) -> None:
        """Before the first step of a phase."""
        if _begins(plan, phase):
            given = plan.recipe.phases[phase.index]
            first = {name: known[0] for name, known in known_shares(given.mixture).items()}
            self._rewards, self._sums = [0.0] * len(first), np.array(0.0)
            self._record(phase, phase.first_step, 0, first)

    def add(self, plan: Plan, phase: PhasePlan, sums: Tensor) -> None:
        """After a step: float64 `[2, streams]`, loss and tokens of this rank by stream."""
        if decides(plan.recipe.phases[phase.index]):
            self._pending.append(sums)

    def facts(self) -> dict[str, Any] | None:
        """What a checkpoint needs to go on from here. Collective."""
        self._fold()
        return {"rewards": self._rewards, "sums": self._sums.tolist()} if self._rewards else None

    def decide(self, plan: Plan, done: int) -> Plan:
        """After `done` steps: at a block's end, the plan with the next block's shares. Collective.

        All ranks get the shares that rank 0 worked out.
        """
        phase = plan.phase_at(done - 1)
        given = plan.recipe.phases[phase.index]
        online = decides(given)
        if online is None or next_boundary(plan, done - 1) != done:
            return plan
        self._fold()
        sums, self._sums = self._sums, np.array(0.0)
        if done == phase.end:
            self._rewards = []
            return plan
        known = known_shares(given.mixture)
        turn = (done - phase.first_step + given.placed("mixture", 0)[0]) // online.every
        losses = [float("nan")] * len(known)
        if turn * online.every > online.warmup:
            losses = _group_losses(plan, phase, sums)
            now = [shares[turn - 1] for shares in known.values()]
            before = self._rewards or [0.0] * len(known)
            self._rewards = next_rewards(before, now, losses, online.decay)
            chosen = next_shares(self._rewards, turn)
        else:
            chosen = [shares[turn - 1] for shares in known.values()]
        decided = [(self._rewards, chosen)]
        torch.distributed.broadcast_object_list(decided, src=0)
        self._rewards, chosen = decided[0]
        rows = {
            name: shares if len(shares) > turn else [*shares, share]
            for (name, shares), share in zip(known.items(), chosen, strict=True)
        }
        row = {name: shares[turn] for name, shares in rows.items()}
        self._record(phase, done, turn, row, losses)
        return plan.again(with_shares(plan.recipe, phase.name, shares=rows))

    def _fold(self) -> None:
        """Add up what is pending, over the ranks: an exchange for each step, so that the order of
        its additions does not depend on how many steps are pending."""
        world, pending = self._world, self._pending
        self._pending = []
        for sums in pending:
            # Tensor-parallel ranks hold the same sums, and only the last stage sees the loss.
            silent = world.tensor_rank or not world.is_last_stage
            total = torch.zeros_like(sums) if silent else sums.clone()
            torch.distributed.all_reduce(total)
            self._sums = self._sums + total.cpu().numpy()

    def _record(
        self,
        phase: PhasePlan,
        done: int,
        block: int,
        shares: Mapping[str, float],
        losses: list[float] | None = None,
    ) -> None:
        """Append the block that begins after `done` steps, unless it is recorded already."""
        if not self._world.is_main or done + 1 <= self._recorded:
            return
        known = zip(shares, losses or (), strict=False)
        entry = {
            "step": done + 1,
            "phase": phase.name,
            "block": block,
            "shares": dict(shares),
            "rewards": dict(zip(shares, self._rewards, strict=True)),
            "losses": {name: loss for name, loss in known if np.isfinite(loss)},
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(entry_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self._recorded = done + 1


def _begins(plan: Plan, phase: PhasePlan) -> bool:
    """Whether the algorithm starts anew in a phase; a piece of a longer one goes on with it."""
    given = plan.recipe.phases[phase.index]
    return bool(decides(given)) and not given.placed("mixture", 0)[0]


def _group_losses(plan: Plan, phase: PhasePlan, sums: np.ndarray) -> list[float]:
    """Mean loss of each domain (or source) over a block; NaN where it had no tokens."""
    recipe = plan.recipe
    groups = [entry.group for entry in mixture_entries(recipe, recipe.phases[phase.index])]
    loss, tokens = (np.bincount(groups, weights=row) for row in sums)
    with np.errstate(invalid="ignore"):
        return (loss / tokens).tolist()
