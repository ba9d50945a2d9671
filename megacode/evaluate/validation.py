"""Validation loss by source: the first windows of each held-out set, the same ones every time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacode.data.loader import validation_batches
from megacode.data.pack_index import open_packs
from megacode.data.records import text_bytes
from megacode.data.source import TokenSource, open_source, pack_cache
from megacode.megatron.distributed import World
from megacode.megatron.step import forward_backward
from megacode.plan.plan import Plan
from megacode.recipe.schema import Recipe
from megacode.tokenizer.tokenizer import Tokenizer

_AT_ONCE = 32
"""Micro-batches for each pipeline stage that go through the model in one go."""


@dataclass(frozen=True)
class Validation:
    """A run's held-out sources by name."""

    plan: Plan
    world: World
    tokenizer: Tokenizer | None
    sources: Mapping[str, TokenSource]
    bytes_per_token: Mapping[str, float]

    @classmethod
    def open(cls, plan: Plan, world: World, tokenizer: Tokenizer | None) -> Validation | None:
        """The recipe's validation sets; None where it has none."""
        sources = {
            name: open_source(name, source.validation_paths, key="validation")
            for name, source in plan.recipe.sources.items()
            if source.validation_paths
        }
        ratios = {
            name: ratio
            for name, source in sources.items()
            if plan.recipe.sources[name].loss_on == "all" and (ratio := _bytes_per_token(source))
        }
        return cls(plan, world, tokenizer, sources, ratios) if sources else None

    @torch.no_grad()
    def losses(self, model_chunks: Sequence[Any], done: int) -> dict[str, tuple[float, int]]:
        """Mean loss over unmasked tokens of each source after `done` steps. Collective.

        Sequences are as long as in the current phase.

        Returns:
            source -> (loss in nats per token, number of tokens), equal on every rank.
        """
        totals = torch.zeros(len(self.sources), 2, dtype=torch.float64, device=self.world.device)
        for chunk in model_chunks:
            chunk.eval()
        for index, name in enumerate(self.sources):
            totals[index] = self._sums(model_chunks, name, done)
        for chunk in model_chunks:
            chunk.train()
        if self.world.tensor_rank:
            totals.zero_()  # every tensor-parallel rank holds the same sums: one of them speaks
        torch.distributed.all_reduce(totals)
        return {
            name: (float(loss / tokens) if tokens else float("nan"), int(tokens))
            for name, (loss, tokens) in zip(self.sources, totals.tolist(), strict=True)
        }

    def _sums(self, model_chunks: Sequence[Any], name: str, done: int) -> Tensor:
        """This rank's sum of losses and number of tokens of a source: float64 `[2]`."""
        recipe, world, tokenizer = self.plan.recipe, self.world, self.tokenizer
        phase = self.plan.phase_at(max(done - 1, 0))
        source, given = self.sources[name], recipe.sources[name]
        packing, length = recipe.packing(name), phase.sequence_length
        if source.marks and packing != "concatenate" and length not in source.packs:
            source.packs[length] = open_packs(source.shards, length, pack_cache(recipe), packing)
        micro_batches = validation_batches(
            source,
            phase.sequence_length,
            given.validation_samples or recipe.evaluation.samples,
            rank=world.data_rank,
            world=world.data_size,
            micro_batch_size=recipe.parallel.micro_batch_size,
            eod_id=tokenizer.eod_id if tokenizer else None,
            reset_at_eod=phase.reset_at_eod,
            mask_eod_loss=recipe.data.mask_eod_loss,
            vocab_size=tokenizer.vocab_size if tokenizer else recipe.model.vocab_size,
            loss_on=given.loss_on,
        )
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        stages = recipe.parallel.pipeline
        # A few at a time, so that a set of any size takes the same memory.
        while some := list(itertools.islice(micro_batches, stages * _AT_ONCE)):
            if recipe.parallel.virtual_pipeline:
                # Interleaved pipelines take multiples of their stages: the rest is masked whole.
                masked = np.zeros_like(some[-1].loss_mask)
                blank = dataclasses.replace(some[-1], loss_mask=masked)
                some += [blank] * (-len(some) % stages)
            sums += forward_backward(model_chunks, some, 1, recipe, world, forward_only=True)[:, 0]
        return sums


@dataclass(frozen=True)
class BitsPerByte:
    """Validation losses in bits per byte of text, by source and domain.

    A loss of l nats a token is l / ln 2 x tokens / bytes. Tokens (with end-of-document ones) and
    bytes are those of the whole held-out set, as its manifest has them. Sets without a manifest
    have no bits per byte, nor have conversations of which only answers are scored.
    """

    by_source: dict[str, float]
    by_domain: dict[str, float]

    @classmethod
    def of(cls, validation: Validation, losses: Mapping[str, tuple[float, int]]) -> BitsPerByte:
        recipe, ratios = validation.plan.recipe, validation.bytes_per_token
        sums: dict[str, tuple[float, float]] = {}
        by_source = {}
        for name, (loss, tokens) in losses.items():
            if tokens and name in ratios:
                bits, size = loss * tokens / math.log(2), tokens * ratios[name]
                by_source[name] = bits / size
                total, count = sums.get(recipe.sources[name].domain, (0.0, 0.0))
                sums[recipe.sources[name].domain] = total + bits, count + size
        return cls(by_source, {domain: bits / size for domain, (bits, size) in sums.items()})


def _bytes_per_token(source: TokenSource) -> float | None:
    sizes = [text_bytes(shard.prefix) for shard in source.shards]
    return None if None in sizes else sum(filter(None, sizes)) / source.tokens


def by_domain(recipe: Recipe, losses: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Token-weighted mean loss of each domain's validation sources."""
    sums: dict[str, tuple[float, int]] = {}
    for name, (loss, tokens) in losses.items():
        if tokens:
            domain = recipe.sources[name].domain
            total, count = sums.get(domain, (0.0, 0))
            sums[domain] = total + loss * tokens, count + tokens
    return {domain: total / count for domain, (total, count) in sums.items()}
