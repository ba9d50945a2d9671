"""A run's folder with checkpoints of random weights, saved by Megatron-Core: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megacode.plan.plan import make_plan
from megacode.plan.summary import plan_summary
from megacode.recipe.load import dump_recipe
from megacode.recipe.schema import (
    LearningRate,
    Mixture,
    Model,
    Mup,
    Phase,
    Recipe,
    Source,
    TokenizerSection,
)  # fmt: skip
from megacode.run.metrics import MetricsWriter
from megacode.tokenizer.training import train_tokenizer
from tests.convert.models import randomise
from tests.processes import run_on
from tests.tokenizer.test_tokenizer import CORPUS

STEPS = (2, 4, 6, 9)
CRYSTAL = Model(
    layers=2, hidden_size=64, heads=4, ffn_size=90, normalization="layernorm", linear_bias=True, rotary_fraction=0.25,
    rotary_interleaved=True, tie_embeddings=True, mup=Mup(base_hidden_size=16, embedding_scale=14.6, output_alpha=2.22),
)  # fmt: skip


def recipe_of(folder: Path, model: Model, bos: bool = True) -> Recipe:
    """Two phases, of 4 and 5 steps."""
    path = folder / "tokenizer.model"
    if not path.exists():
        train_tokenizer(CORPUS, path, vocab_size=420)
    rate = LearningRate(schedule="constant", peak=1e-3)
    usual: dict[str, Any] = dict(
        batch_size=2, sequence_length=64, learning_rate=rate, mixture=Mixture(sources={"a": 1.0})
    )
    return Recipe(
        name="tiny", model=model, sources={"a": Source(path=str(folder / "a"), tokens=100_000, domain="code")},
        phases=[Phase(name="one", steps=4, **usual), Phase(name="two", steps=5, **usual)], precision="fp32",
        tokenizer=TokenizerSection(path=str(path), added_tokens="crystal", bos=bos),
    )  # fmt: skip


def save(world: Any, run: str, recipe: Recipe, steps: tuple[int, ...], vocab_size: int) -> None:
    from megatron.core import dist_checkpointing

    from megacode.megatron.checkpoint import _sharded_state
    from megacode.megatron.model import build_model

    for step in steps:
        chunks = build_model(recipe.model_copy(update={"seed": step}), vocab_size)
        randomise(chunks)
        with torch.no_grad():  # else a tied embedding says its own token again and again
            for name, parameter in chunks[0].named_parameters():
                if parameter.ndim == 2 and "layers" in name:
                    parameter.mul_(20)
                if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                    parameter[3:259] = (
                        0  # and no bytes, which libraries show in their own ways where they are no UTF-8
                    )
        place = Path(run, "checkpoints", f"step_{step:08d}")
        place.mkdir(parents=True)
        dist_checkpointing.save(_sharded_state(chunks, None, loading=False), str(place))
        (place / "recipe.yaml").write_text(dump_recipe(recipe))
        info = {
            "step": step,
            "phase": "one" if step <= 4 else "two",
            "tokens": step * 128,
            "vocab_size": vocab_size,
        }
        (place / "megacode.json").write_text(json.dumps(info))


def make_run(
    folder: Path, model: Model = CRYSTAL, steps: tuple[int, ...] = STEPS, bos: bool = True
) -> Path:
    """FOLDER/run with these checkpoints, metrics and a plan."""
    recipe = recipe_of(folder, model, bos)
    run = folder / "run"
    run_on(1, save, str(run), recipe, steps, 452)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    plan = make_plan(recipe, {"a": 100_000})
    (run / "plan.json").write_text(json.dumps(plan_summary(plan, 452)))
    (run / "checkpoints" / "latest").write_text(f"step_{steps[-1]:08d}\n")
    with MetricsWriter(run, tensorboard=False) as writer:
        for step in range(1, steps[-1] + 1):
            losses = {"code": 6 - step / 10}
            writer.write(
                {
                    "kind": "train", "step": step, "phase": plan.phase_at(step - 1).name, "loss": 6 - step / 10,
                    "learning_rate": 1e-3, "batch_size": 2, "tokens": step * 128, "seconds": 1.0, "loss_by_domain": losses,
                    "tokens_per_second": 128.0, "ratio_by_domain": {"code": 1.0},
                }
            )  # fmt: skip
    return run


def damage_tensors(checkpoint: Path) -> None:
    """Zeros where each tensor's archive begins; what is no tensor stays whole."""
    from megacode.megatron.checkpoint_index import read_index

    index = read_index(checkpoint)
    for entry, place in index.storage_data.items():
        if type(index.state_dict_metadata.get(entry.fqn)).__name__ == "TensorStorageMetadata":
            with open(checkpoint / place.relative_path, "r+b") as file:
                file.seek(place.offset)
                file.write(bytes(min(500, place.length)))
