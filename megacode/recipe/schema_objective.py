"""What a phase minimises: next-token loss, and losses of pairs of code beside it.

Next token prediction+ (arXiv 2404.08885) adds hard negatives to next-token training. Its loss and
data are not published. `contrastive` and `weighted_tokens` are two readings of it, both ours.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megacode.recipe.schema_mixture import Weight
from megacode.recipe.section import Section

Pooling = Literal["mean", "last"]


class Contrastive(Section):
    """Embeddings of code that is equivalent to a query's go near it, those of other code away from
    it. The batch is that of the step over all ranks, whatever their layout. It costs one more
    forward pass a step."""

    weight: Weight = 0.1
    """Of this loss in the sum of losses (ours; a schedule runs over the phase)."""
    loss: Literal["infonce", "triplet"] = "infonce"
    temperature: float = Field(default=0.05, gt=0)
    """Of InfoNCE: what cosine similarities are divided by (as ContraCLM and CL4D have it)."""
    margin: float = Field(default=0.2, gt=0)
    """Of the triplet loss, in cosine similarity."""
    pooling: Pooling = "mean"
    """An embedding: the mean of the hidden states of a member's tokens, or that of its last one."""
    layer: int | Literal["last"] = "last"
    """After which layer, from 1; `last` is after the final norm."""
    in_batch: bool = True
    """Candidates of the step's other pairs are negatives too."""

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("contrastive", "contrastive_accuracy")


class WeightedTokens(Section):
    """Query and candidate stand in one sequence (`megacode preprocess --pairs sequences`), and each
    token's loss counts by what it belongs to."""

    weight: Weight = 1.0
    """Of this loss in the sum of losses."""
    query: float = Field(default=0.0, ge=0)
    """Of tokens of queries, whose next-token loss `next_token` has already."""
    equivalent: float = Field(default=1.0, ge=0)
    """Of tokens of equivalent candidates: -log p."""
    other: float = Field(default=0.1, ge=0)
    """Of tokens of other candidates: -log(1 - p), unlikelihood (arXiv 1908.04319)."""

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("weighted_tokens",)


class Objective(Section):
    """Losses of a phase, and what each counts in their sum."""

    next_token: Weight = 1.0
    """The mean over tokens that are trained on (`loss_on`)."""
    contrastive: Contrastive | None = None
    weighted_tokens: WeightedTokens | None = None

    @model_validator(mode="after")
    def _something(self) -> Objective:
        if self.next_token == 0 and not self.contrastive and not self.weighted_tokens:
            raise ValueError("every loss has the weight 0; raise `next_token`")
        return self

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of what a step reports beside the next-token loss."""
        parts = (self.contrastive, self.weighted_tokens)
        return tuple(name for part in parts if part for name in part.numbers)
