"""A checkpoint's model for inference, in one process, and its forward pass with a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.errors import UserError
from megacode.launch import free_port
from megacode.megatron import cpu
from megacode.recipe.load import load_recipe
from megacode.recipe.megatron_fields import EFFECT
from megacode.recipe.schema import Fusion, Parallel, Precision
from megacode.run.checkpoints import find_checkpoint, read_info
from megacode.tokenizer.tokenizer import load_tokenizer


def cached_forward(model: Any, length: int) -> Callable[[Sequence[int]], Tensor]:
    """A function that reads tokens behind those it has read, and gives the logits after the last.

    They are fp32 `[vocab]`, on the host.

    Args:
        length: tokens that it will read in all.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    device = next(model.parameters()).device
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=length)
    position = 0

    @torch.no_grad()
    def read(tokens: Sequence[int]) -> Tensor:
        nonlocal position
        fresh = torch.tensor([tokens], device=device)
        count = fresh.shape[1]
        positions = torch.arange(position, position + count, device=device)[None]
        mask = None  # one new query sees every cached key
        if count > 1:  # hidden where the key comes after the query
            mask = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)[None, None]
        logits = model(
            fresh, positions, mask, inference_context=context, runtime_gather_output=True
        )
        context.increment_sequence_len_offset(count)
        position += count
        return logits[0, -1].float().cpu()

    return read


def open_for_inference(checkpoint: Path) -> tuple[Any, Any, Any]:
    """(recipe, tokenizer, model in evaluation mode) of a checkpoint, on one process.

    Raises:
        UserError: no complete checkpoint there, or it names no tokenizer.
    """
    cpu.prepare()
    from megacode.megatron.checkpoint import load_checkpoint
    from megacode.megatron.distributed import Launch, initialize
    from megacode.megatron.model import build_model

    path = find_checkpoint(checkpoint)
    recipe = load_recipe(path / "recipe.yaml")
    model = recipe.model_in(read_info(path).get("phase"))
    # FP8 is a way to train: the weights of a run are bf16's, and inference computes in that.
    precision = Precision(compute="bf16") if recipe.precision.compute == "fp8" else recipe.precision
    given = model.megatron.items()
    kept = {name: value for name, value in given if EFFECT.get(name) == "function"}
    model = model.model_copy(update={"megatron": kept})
    recipe = recipe.model_copy(
        update={"parallel": Parallel(), "fusion": Fusion(), "precision": precision, "model": model}
    )
    if recipe.tokenizer is None:
        raise UserError(
            f"{path / 'recipe.yaml'}: names no tokenizer, and text needs one; add `tokenizer:` to "
            "it"
        )
    tokenizer = load_tokenizer(recipe.tokenizer)
    alone = Launch(0, 1, 0, "127.0.0.1", free_port(), "single process")
    initialize(recipe.parallel, recipe.seed, alone)
    model_chunks = build_model(recipe, tokenizer.vocab_size)
    load_checkpoint(path, model_chunks, None)
    return recipe, tokenizer, model_chunks[0].eval()
