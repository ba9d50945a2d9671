"""A model as the loop or a verb holds it, with what scoring and generation need to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.megatron.distributed import World, current_world
from megacode.megatron.inference import open_for_inference
from megacode.recipe.schema import Recipe
from megacode.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """This rank's model chunks, in evaluation mode.

    Attributes:
        context_length: most tokens that the model reads.
    """

    recipe: Recipe
    tokenizer: Tokenizer
    chunks: Sequence[Any]
    world: World
    context_length: int

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer; the model may have further rows."""
        return self.tokenizer.vocab_size

    @property
    def bos(self) -> bool:
        """Whether texts begin with BOS."""
        return bool(self.recipe.tokenizer and self.recipe.tokenizer.bos)

    @property
    def length_unit(self) -> int:
        """Of which the length of a sequence is a multiple in this layout."""
        context = self.recipe.parallel.context
        return 2 * context if context > 1 else 1

    @property
    def tokens_at_once(self) -> int:
        """Of a micro-batch, as in training."""
        longest = max(phase.sequence_length for phase in self.recipe.phases)
        return self.recipe.parallel.micro_batch_size * min(longest, self.context_length)


def open_model(checkpoint: Path) -> LoadedModel:
    """A checkpoint's model, on one process. UserError as of `open_for_inference`."""
    recipe, tokenizer, model = open_for_inference(checkpoint)
    length = recipe.model.context_length
    return LoadedModel(recipe, tokenizer, [model], current_world(), length)
