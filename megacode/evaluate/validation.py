"""Validation loss by source: the first windows of each held-out set, the same ones every time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megacode.data.batch import Batch
from megacode.data.loader import validation_batches
from megacode.data.source import TokenSource, open_source
from megacode.megatron.distributed import World
from megacode.megatron.step import forward_backward
from megacode.plan.plan import Plan
from megacode.recipe.schema import Recipe
from megacode.tokenizer.tokenizer import Tokenizer

_AT_ONCE = 32
"""Micro-batches for each pipeline stage that go through the model in one go."""


@dataclass(frozen=True)
class Validation:
    """Held-out sources by name, which end-of-document token bounds their documents, and the ids they may hold."""

    sources: Mapping[str, TokenSource]
    eod: int | None
    vocab_size: int | None

    @classmethod
    def open(cls, plan: Plan, world: World, tokenizer: Tokenizer | None) -> Validation | None:
        """The recipe's validation sets; None where it has none."""
        sources = {
            name: open_source(name, source.validation_paths, key="validation")
            for name, source in plan.recipe.sources.items()
            if source.validation_paths
        }
        if not sources:
            return None
        vocab_size = tokenizer.vocab_size if tokenizer else plan.recipe.model.vocab_size
        return cls(sources, tokenizer.eod_id if tokenizer else None, vocab_size)


def validate(
    validation: Validation, model_chunks: Sequence[Any], plan: Plan, done: int, world: World
) -> dict[str, tuple[float, int]]:
    """Mean loss over unmasked tokens of each validation source after `done` steps, at the current phase's length. Collective.

    Returns:
        source -> (loss in nats per token, number of tokens), equal on every rank.
    """
    recipe = plan.recipe
    phase = plan.phase_at(max(done - 1, 0))
    totals = torch.zeros(len(validation.sources), 2, dtype=torch.float64, device=world.device)
    for chunk in model_chunks:
        chunk.eval()
    with torch.no_grad():
        for index, (name, source) in enumerate(validation.sources.items()):
            every = validation_batches(
                source,
                phase.sequence_length,
                recipe.sources[name].validation_samples or recipe.evaluation.samples,
                rank=world.data_rank,
                world=world.data_size,
                micro_batch_size=recipe.parallel.micro_batch_size,
                eod_id=validation.eod,
                reset_at_eod=phase.reset_at_eod,
                mask_eod_loss=recipe.data.mask_eod_loss,
                vocab_size=validation.vocab_size,
            )
            # A few at a time, so that a set of any size takes the same memory.
            while micro_batches := list(
                itertools.islice(every, recipe.parallel.pipeline * _AT_ONCE)
            ):
                if recipe.parallel.virtual_pipeline:
                    _fill_up(micro_batches, recipe.parallel.pipeline)
                totals[index] += forward_backward(
                    model_chunks, micro_batches, 1, recipe, world, forward_only=True
                )[:, 0]
    for chunk in model_chunks:
        chunk.train()
    if world.tensor_rank:
        totals.zero_()  # every tensor-parallel rank holds the same sums: one of them speaks
    torch.distributed.all_reduce(totals)
    return {
        name: (float(loss / tokens) if tokens else float("nan"), int(tokens))
        for name, (loss, tokens) in zip(validation.sources, totals.tolist(), strict=True)
    }


def _fill_up(micro_batches: list[Batch], multiple: int) -> None:
    """Masked copies of the last micro-batch until their number is a multiple, as interleaved pipelines need it."""
    blank = dataclasses.replace(
        micro_batches[-1], loss_mask=np.zeros_like(micro_batches[-1].loss_mask)
    )
    micro_batches += [blank] * (-len(micro_batches) % multiple)


def by_domain(recipe: Recipe, losses: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Token-weighted mean loss of each domain's validation sources."""
    sums: dict[str, list[float]] = {}
    for name, (loss, tokens) in losses.items():
        if tokens:
            entry = sums.setdefault(recipe.sources[name].domain, [0.0, 0.0])
            entry[0] += loss * tokens
            entry[1] += tokens
    return {domain: loss / tokens for domain, (loss, tokens) in sums.items()}
