"""A checkpoint's model for inference, in one process, and its forward pass with a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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


class CachedModel:
    """Reads texts a few tokens at a time, behind those that it has read.

    In any layout but context parallelism; on the ranks of one pipeline together, and within
    `for_inference`.

    Args:
        model_chunks: this rank's.
        rows: texts at once, of one length.
        length: tokens of each that it will read in all.
    """

    def __init__(self, model_chunks: Sequence[Any], rows: int, length: int) -> None:
        from megatron.core import parallel_state
        from megatron.core.inference.contexts import StaticInferenceContext

        self._chunks = model_chunks
        self._context = StaticInferenceContext(rows, length)
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        self._position = 0

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor | None:
        """fp32 `[rows, vocab]` after the last of `tokens`, which are int64 `[rows, count]`.

        None where this rank is not of the last pipeline stage.
        """
        from megatron.core.inference.communication_utils import send_to_next_pipeline_rank

        count = tokens.shape[1]
        device = next(self._chunks[0].parameters()).device
        tokens = tokens.to(device)
        positions = torch.arange(self._position, self._position + count, device=device)
        mask = None  # one new query sees every cached key
        if count > 1:  # hidden where the key comes after the query
            mask = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)[None, None]
        ends, logits = self._stages.size() - 1 == self._stages.rank(), None
        for number, chunk in enumerate(self._chunks):
            if number or self._stages.rank():
                self._receive(chunk, tokens)
            out = chunk(
                tokens,
                positions.expand_as(tokens),
                mask,
                inference_context=self._context,
                runtime_gather_output=True,
            )
            if ends and number == len(self._chunks) - 1:
                logits = out[:, -1].float()
            else:
                send_to_next_pipeline_rank(out.contiguous(), self._stages)
        self._context.increment_sequence_len_offset(count)
        self._position += count
        return logits

    def _receive(self, chunk: Any, tokens: Tensor) -> None:
        """Hand a chunk the hidden states `[count, rows, hidden]` of the stage before."""
        from megatron.core.inference.communication_utils import recv_from_prev_pipeline_rank_
        from megatron.core.utils import get_attr_wrapped_model, get_model_config

        config = get_model_config(chunk)
        shape = tokens.shape[1], tokens.shape[0], config.hidden_size
        hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=tokens.device)
        recv_from_prev_pipeline_rank_(hidden, self._stages)
        get_attr_wrapped_model(chunk, "set_input_tensor")(hidden)

    def share(self, drawn: Tensor | None, rows: int) -> Tensor:
        """Tokens that the last stage drew from its logits, int64 `[rows]`, on every stage."""
        if drawn is None:
            drawn = torch.empty(rows, dtype=torch.int64)
        if self._stages.size() == 1:
            return drawn
        last = torch.distributed.get_process_group_ranks(self._stages)[-1]
        shared = drawn.to(next(self._chunks[0].parameters()).device)
        torch.distributed.broadcast(shared, last, self._stages)
        return shared.cpu()


_SEQUENCE_PARALLEL = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)


@contextlib.contextmanager
def for_inference(model_chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, the model evaluates: no dropout, no FP8, no recorded graphs, whole sequences on every
    tensor-parallel rank (a sequence of one token cannot be cut)."""
    from megatron.core.utils import get_model_config

    from megacode.megatron.step import without_fp8
    from megacode.megatron.workarounds import without_graphs

    training = [chunk.training for chunk in model_chunks]
    owners = {id(get_model_config(chunk)): get_model_config(chunk) for chunk in model_chunks}
    owners |= {id(module): module for chunk in model_chunks for module in chunk.modules()}
    cut = [
        (owner, name)
        for owner in owners.values()
        for name in _SEQUENCE_PARALLEL
        if getattr(owner, name, None) is True
    ]
    for chunk in model_chunks:
        chunk.eval()
    for owner, name in cut:
        setattr(owner, name, False)
    try:
        with without_fp8(model_chunks), without_graphs(model_chunks):
            yield
    finally:
        for owner, name in cut:
            setattr(owner, name, True)
        for chunk, was in zip(model_chunks, training, strict=True):
            chunk.train(was)


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
    initialize(recipe.parallel, recipe.resolved_model_seed, alone)
    model_chunks = build_model(recipe, tokenizer.vocab_size)
    load_checkpoint(path, model_chunks, None)
    return recipe, tokenizer, model_chunks[0].eval()
