"""Small models of every family with odd shapes, saved as checkpoints by Megatron-Core in a parallel layout, and their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megacode.recipe.schema import (
    LearningRate,
    Mixture,
    Model,
    Parallel,
    Phase,
    Recipe,
    RotaryScaling,
    Source,
)

VOCAB, LENGTH = 300, 24
NEOX = dict(normalization="layernorm", linear_bias=True)
MODELS: dict[str, Model] = {
    "llama": Model(layers=4, hidden_size=96, heads=6, kv_heads=2, ffn_size=200, rotary_base=5e5),
    "llama biases, head_dim, interleaved, tied": Model(
        layers=2, hidden_size=64, heads=4, head_dim=24, ffn_size=130, linear_bias=True, rotary_interleaved=True,
        tie_embeddings=True,
    ),
    "llama scaled": Model(
        layers=2, hidden_size=64, heads=4, ffn_size=96, rotary_base=5e5,
        rotary_scaling=RotaryScaling(kind="llama3", factor=32.0),
    ),
    "llama yarn, tied": Model(
        layers=2, hidden_size=64, heads=4, ffn_size=96, rotary_base=1e3, tie_embeddings=True,
        rotary_scaling=RotaryScaling(kind="yarn", factor=4.0, original_context_length=16),
    ),
    "mistral window": Model(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_size=96, sliding_window=5),
    "smollm3": Model(layers=4, hidden_size=64, heads=4, kv_heads=2, ffn_size=96, no_rope_layer_interval=2, tie_embeddings=True),
    "mistral": Model(layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=24, ffn_size=96),
    "qwen2": Model(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_size=136, qkv_bias=True, tie_embeddings=True),
    "qwen3": Model(layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=32, qk_norm=True, norm_epsilon=1e-6),
    "qwen3 interleaved": Model(layers=2, hidden_size=64, heads=4, head_dim=24, qk_norm=True, rotary_interleaved=True),
    "stablelm": Model(
        layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_size=150, normalization="layernorm", rotary_fraction=0.25,
        rotary_scaling=RotaryScaling(kind="linear", factor=4.0),
    ),
    "stablelm biases, interleaved": Model(
        layers=2, hidden_size=64, heads=2, ffn_size=150, normalization="layernorm", qkv_bias=True, rotary_fraction=0.5,
        rotary_interleaved=True, tie_embeddings=True,
    ),
    "starcoder2": Model(
        layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_size=230, activation="gelu-tanh", tie_embeddings=True, **NEOX
    ),
    "gpt_bigcode": Model(
        layers=2, hidden_size=64, heads=4, kv_heads=1, ffn_size=230, activation="gelu-tanh", position_embedding="learned",
        tie_embeddings=True, **NEOX,
    ),
    "gpt_bigcode heads alone": Model(
        layers=2, hidden_size=64, heads=4, ffn_size=256, activation="gelu", position_embedding="learned", **NEOX
    ),
    "gpt_neox": Model(layers=2, hidden_size=64, heads=4, ffn_size=256, activation="gelu", rotary_fraction=0.25, **NEOX),
    "gpt_neox interleaved": Model(
        layers=2, hidden_size=64, heads=4, ffn_size=100, activation="relu", rotary_fraction=0.5, rotary_interleaved=True, **NEOX
    ),
}  # fmt: skip


def recipe_of(model: Model, parallel: Parallel | None = None) -> Recipe:
    phase = Phase(name="p", steps=1, batch_size=2, sequence_length=LENGTH, mixture=Mixture(sources={"a": 1.0}),
                  learning_rate=LearningRate(peak=1e-3))  # fmt: skip
    return Recipe(
        name="t", model=model, sources={"a": Source(path="a", tokens=1000)}, phases=[phase], precision="fp32",
        parallel=parallel or Parallel(),
    )  # fmt: skip


def tokens_to_try() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def save_and_run(
    world: Any, folder: str, models: dict[str, Model], parallel: Parallel, start: bool
) -> dict[str, torch.Tensor]:
    """For each model: random weights saved to FOLDER/NAME (or, with `start` false, those of FOLDER/NAME loaded), and logits.

    Returns:
        name -> this rank's [2, LENGTH, share of the vocabulary]; empty where the rank is not on the last stage.
    """
    from megatron.core import dist_checkpointing

    from megacode.megatron.checkpoint import _sharded_state, load_checkpoint
    from megacode.megatron.model import build_model
    from megacode.recipe.load import dump_recipe

    out = {}
    for name, model in models.items():
        recipe = recipe_of(model, parallel)
        chunks = build_model(recipe, VOCAB)
        place = Path(folder, name.replace(" ", "-").replace(",", ""))
        if start:
            randomise(chunks)
            if world.is_main:
                place.mkdir(parents=True)
            torch.distributed.barrier()
            dist_checkpointing.save(_sharded_state(chunks, None, loading=False), str(place))
            if world.is_main:
                (place / "recipe.yaml").write_text(dump_recipe(recipe))
                (place / "megacode.json").write_text(json.dumps({"step": 1, "vocab_size": VOCAB}))
            torch.distributed.barrier()
        else:
            load_checkpoint(place, chunks, None)
        out[name] = logits(world, chunks, recipe)
    return out


def randomise(chunks: list[Any]) -> None:
    """Larger weights than initial ones, biases and norms that matter; padding stays zero."""
    from megacode.megatron.model import global_parameter_names

    for name, parameter in global_parameter_names(chunks).items():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        with torch.no_grad():
            if parameter.ndim == 1 and "linear_fc1.bias" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim == 2:
                parameter.mul_(3)


def logits(world: Any, chunks: list[Any], recipe: Recipe) -> torch.Tensor:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    seen = []
    tokens, positions = tokens_to_try(), torch.arange(LENGTH).expand(2, -1)

    def forward(iterator: Any, model: Any) -> Any:
        def keep(output: torch.Tensor) -> Any:
            seen.append(output.detach())
            return output.sum(), torch.tensor(1), {}

        return model(tokens, positions, None), keep

    chunks[0].eval()
    get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter([0]), model=chunks[0], num_microbatches=1, seq_length=LENGTH,
        micro_batch_size=2, forward_only=True,
    )  # fmt: skip
    return seen[0] if seen else torch.zeros(0)
