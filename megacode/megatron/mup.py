"""Maximal update parametrisation (muP, arXiv 2203.03466 table 8): the factors a width brings, put where they act.

The numbers themselves are properties of `recipe.model` (`width_ratio`, `embedding_scale`, `logit_scale`, ...); the initial
weights are in `initialize.py`. Megatron-Core from 0.17 on multiplies embeddings and logits itself; before, hooks do it here.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megacode.recipe.schema import Model

_OWN = "use_mup" in TransformerConfig.__dataclass_fields__


def scale_fields(model: Model) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig that carry the factors, where it has them.

    Its own base width is left at the model's width, so that it derives nothing: all factors are given.
    """
    if not _OWN or (model.embedding_scale == 1.0 and model.logit_scale == 1.0):
        return {}
    return dict(
        use_mup=True, mup_embedding_mult=model.embedding_scale, mup_output_mult=model.logit_scale
    )


def apply_scales(chunk: GPTModel, model: Model) -> None:
    """Multiply the embedding's output and the logits of a chunk that has them, unless Megatron-Core does."""
    if _OWN:
        return
    if chunk.pre_process and model.embedding_scale != 1.0:
        # Word and position embeddings together, as Megatron-Core's own muP does; dropout after it commutes.
        chunk.embedding.register_forward_hook(
            lambda module, args, output: output * model.embedding_scale
        )
    if chunk.post_process and model.logit_scale != 1.0:

        def scale(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            return output[0] * model.logit_scale, output[1]

        chunk.output_layer.register_forward_hook(scale)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether both sides of a parameter grow with the width; `name` is Megatron-Core's.

    The embeddings and an output layer have the vocabulary on one side, a router its experts, biases and norms no second side.
    """
    outer = ("embedding.", "output_layer.")
    return parameter.ndim >= 2 and not name.startswith(outer) and not name.endswith("router.weight")


def rate_multiplier(model: Model, name: str, parameter: nn.Parameter) -> float:
    """Factor on the learning rate (and with it on decoupled weight decay) of a parameter."""
    return model.width_ratio if model.mup and is_hidden_matrix(name, parameter) else 1.0
