"""Rotary positions of every kind against transformers' own, and as they change in a model that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacode.recipe.schema import Model, RotaryScaling
from tests.megatron.test_transformers_parity import small
from tests.processes import run_on

LENGTH = 64
KINDS: dict[str, RotaryScaling | None] = {
    "plain": None,
    "linear": RotaryScaling(kind="linear", factor=4.0),
    "llama3": RotaryScaling(kind="llama3", factor=8.0),
    "llama3 from 64": RotaryScaling(kind="llama3", factor=8.0, original_context_length=64),
    "yarn": RotaryScaling(kind="yarn", factor=4.0, original_context_length=4096),
    "yarn from 64": RotaryScaling(kind="yarn", factor=16.0, original_context_length=64),
}
FRACTIONS = (1.0, 0.5)


def model_of(kind: str, fraction: float = 1.0) -> Model:
    return Model(
        layers=1, hidden_size=128, heads=2, rotary_base=5e4, rotary_fraction=fraction, rotary_scaling=KINDS[kind]
    )  # fmt: skip


def cosines_and_sines(world: Any) -> dict[tuple[str, float], torch.Tensor]:
    """What attention multiplies a head's first half of rotated dimensions by: `[2, LENGTH, half]`.

    One model for each fraction takes every kind in turn.
    """
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as attention_factor,
    )

    from megacode.megatron.model import build_model
    from megacode.megatron.rotary import set_rotary

    found = {}
    for fraction in FRACTIONS:
        chunks = build_model(small(model_of("yarn", fraction)), 100)
        for kind in [*KINDS, *KINDS]:
            set_rotary(chunks, model_of(kind, fraction))
            turned = chunks[0].rotary_pos_emb(LENGTH)[:, 0, 0]
            turned = turned[:, : turned.shape[1] // 2]
            both = torch.stack([turned.cos(), turned.sin()]) * attention_factor(chunks[0].config)
            found[kind, fraction] = both
    return found


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, float], torch.Tensor]:
    return run_on(1, cosines_and_sines)[0]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_cosines_and_sines_are_those_of_transformers(
    kind: str, fraction: float, ours: dict[tuple[str, float], torch.Tensor]
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

    from megacode.convert.config_keys import rope_keys

    model = model_of(kind, fraction)
    config = transformers.StableLmConfig(
        hidden_size=128, num_attention_heads=2, partial_rotary_factor=fraction, **rope_keys(model, 65536)
    )  # fmt: skip
    rotary = StableLmRotaryEmbedding(config)
    named = KINDS[kind].kind if KINDS[kind] else "default"
    assert rotary.rope_type == named and (named == "default" or named in ROPE_INIT_FUNCTIONS)
    cos, sin = rotary(torch.zeros(1), torch.arange(LENGTH)[None])
    half = model.rotated_dimensions // 2
    theirs = torch.stack([cos[0, :, :half], sin[0, :, :half]])
    assert theirs.shape == ours[kind, fraction].shape
    assert float((theirs - ours[kind, fraction]).abs().max()) < 1e-5
    if kind != "plain":
        assert float((theirs - ours["plain", fraction]).abs().max()) > 1e-3


def logits_of_every_kind(world: Any) -> dict[str, torch.Tensor]:
    from megacode.megatron.model import build_model
    from megacode.megatron.rotary import set_rotary

    tokens = torch.randint(100, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    positions, found = torch.arange(LENGTH)[None], {}
    changed = build_model(small(model_of("plain")), 100)
    for kind in KINDS:
        set_rotary(changed, model_of(kind))
        found[f"changed {kind}"] = changed[0].eval()(tokens, positions, None).detach()
        (built,) = build_model(small(model_of(kind)), 100)
        found[f"built {kind}"] = built.eval()(tokens, positions, None).detach()
    return found


def test_a_model_that_is_changed_is_the_one_that_is_built() -> None:
    (found,) = run_on(1, logits_of_every_kind)
    for kind in KINDS:
        assert torch.equal(found[f"changed {kind}"], found[f"built {kind}"]), kind
