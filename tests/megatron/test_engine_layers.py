"""What Transformer Engine's layers need of us, shown with stand-ins on the CPU: its modules ask checkpoints for states that local
layers do not leave there, its loss must not make the host wait, and its attention is chosen in one place."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megacode.errors import UserError
from tests.megatron.test_initialize import CRYSTAL, VOCAB, recipe
from tests.processes import run_on


def loaded_into_engine_modules(world, folder: str) -> tuple[list[bool], list[object], str]:
    """A checkpoint of local layers, loaded where norms keep an `_extra_state` as Transformer Engine's do: are the weights
    there, which states were set; and what is said where a weight is missing."""
    from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
    from megacode.megatron.model import build_model
    from megacode.recipe.schema import Checkpoints
    from megacode.run.checkpoints import find_checkpoint

    given: list[object] = []

    def with_state(norm: torch.nn.Module) -> None:
        hooks = {
            "get_extra_state": lambda self: torch.zeros(0),
            "set_extra_state": lambda self, state: given.append(state),
        }
        norm.__class__ = type("EngineNorm", (norm.__class__,), hooks)

    source, target = (build_model(recipe(CRYSTAL), VOCAB) for _ in range(2))
    with torch.no_grad():
        for parameter in source[0].parameters():
            parameter.add_(1.0)
    Checkpointer(Path(folder), Checkpoints(asynchronous=False)).save(0, source, None, {}, "")
    with_state(target[0].decoder.final_layernorm)
    for layer in target[0].decoder.layers:
        with_state(layer.input_layernorm)
    checkpoint = find_checkpoint(folder)
    load_checkpoint(checkpoint, target, None)
    same = [
        bool(torch.equal(a, b))
        for a, b in zip(source[0].parameters(), target[0].parameters(), strict=True)
    ]
    target[0].decoder.final_layernorm.register_parameter(
        "another", torch.nn.Parameter(torch.zeros(3))
    )
    try:
        load_checkpoint(checkpoint, target, None)
    except UserError as error:
        return same, given, str(error)
    return same, given, ""


def test_a_checkpoint_of_local_layers_loads_where_modules_keep_states(tmp_path: Path) -> None:
    ((same, given, refusal),) = run_on(1, loaded_into_engine_modules, str(tmp_path))
    assert all(same) and not given
    assert "cannot be loaded" in refusal and "decoder.final_layernorm.another" in refusal


def losses(world) -> tuple[list[bool], np.ndarray, np.ndarray]:
    from megatron.core import tensor_parallel
    from megatron.core.extensions import transformer_engine

    from megacode.megatron import workarounds

    capturable = []

    def stand_in(logits, labels, group, is_cg_capturable=False):
        capturable.append(is_cg_capturable)
        assert labels.stride() == (labels.size(1), 1)
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)

    labels = torch.randint(VOCAB, (3, 16))
    logits = torch.randn(16, 3, VOCAB)
    plain = torch.nn.functional.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
    config = SimpleNamespace(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    model = SimpleNamespace(config=config, pg_collection=SimpleNamespace(tp=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_engine, "te_parallel_cross_entropy", stand_in)
        patch.setattr(workarounds, "is_te_min_version", lambda version: True)
        fused = workarounds.Gpt.compute_language_model_loss(model, labels, logits)  # type: ignore[arg-type]
    return capturable, fused.numpy(), plain.numpy()


def test_the_fused_loss_is_told_not_to_wait() -> None:
    ((capturable, fused, plain),) = run_on(1, losses)
    assert capturable == [True]
    np.testing.assert_allclose(fused, plain, rtol=1e-5)


def attention_chosen(world) -> tuple[str, dict[str, str], str]:
    """By the recipe; and what is said where the environment has chosen otherwise."""
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model

    chosen = recipe(CRYSTAL.model_copy(update={"megatron": {"attention_backend": "fused"}}))
    build_model(chosen, VOCAB)
    found = {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}
    try:
        build_model(recipe(CRYSTAL), VOCAB)
    except UserError as error:
        return megatron_config(chosen).transformer.attention_backend.name, found, str(error)
    return "", {}, ""


def test_attention_is_chosen_by_the_recipe_alone() -> None:
    ((name, variables, refusal),) = run_on(1, attention_chosen)
    assert name == "fused"
    assert variables == {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}
    assert refusal.startswith("the environment has NVTE_FLASH_ATTN set to 0")
    assert "model.megatron.attention_backend" in refusal
