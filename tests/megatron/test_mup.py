"""The muP model is the published one: its forward pass against one written from the paper's numbers, its rates by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megacode.megatron.optimizer import multipliers, mup_multiplier
from megacode.recipe.schema import Model, Mup, Parallel
from tests.megatron.test_initialize import CRYSTAL, VOCAB, recipe
from tests.processes import run_on


def published_forward(
    weights: dict[str, Tensor], tokens: Tensor, heads: int, rotary: int
) -> Tensor:
    """Logits [n, S, V] of the published modelling form, in float64, from Megatron-Core's tensors of one rank."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def rotated(
        x: Tensor,
    ) -> Tensor:  # [n, S, heads, dim]: pairs (x0, x1), (x2, x3) ... of the first dimensions
        positions = torch.arange(x.shape[1], dtype=torch.float64)
        angles = positions[:, None] * 10000 ** (
            -torch.arange(0, rotary, 2, dtype=torch.float64) / rotary
        )
        cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
        even, odd = x[..., 0:rotary:2], x[..., 1:rotary:2]
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        return torch.cat((turned, x[..., rotary:]), -1)

    x = weights["embedding.word_embeddings.weight"][tokens] * 14.6
    n, length, hidden = x.shape
    dim = hidden // heads
    for i in range(CRYSTAL.layers):
        layer = f"decoder.layers.{i}."
        fused = linear(norm(x, layer + "input_layernorm"), layer + "self_attention.linear_qkv")
        q, k, v = fused.reshape(n, length, heads, 3, dim).unbind(3)
        scores = torch.einsum("nqhd,nkhd->nhqk", rotated(q), rotated(k)) / dim
        scores = scores.masked_fill(
            torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf
        )
        mixed = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v).reshape(n, length, hidden)
        x = x + linear(mixed, layer + "self_attention.linear_proj")
        gate, up = linear(norm(x, layer + "pre_mlp_layernorm"), layer + "mlp.linear_fc1").chunk(
            2, dim=-1
        )
        x = x + linear(gate * torch.sigmoid(gate) * up, layer + "mlp.linear_fc2")
    return (
        norm(x, "decoder.final_layernorm")
        @ weights["embedding.word_embeddings.weight"].T
        * (2.22 * 64 / 256)
    )


def logits_and_weights(world):
    from megacode.megatron.model import build_model

    model = CRYSTAL.model_copy(update={"pad_multiple": 2})
    (chunk,) = build_model(recipe(model), VOCAB)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in chunk.parameters():  # so that biases and norms count
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(VOCAB, (2, 32), generator=generator)
    logits = chunk.eval()(tokens, torch.arange(32).expand(2, -1), None).detach()
    return {k: v.detach() for k, v in chunk.state_dict().items() if v is not None}, tokens, logits


def test_forward_is_the_published_one() -> None:
    ((weights, tokens, logits),) = run_on(1, logits_and_weights)
    expected = published_forward(
        {k: v.double() for k, v in weights.items()}, tokens, heads=4, rotary=16
    )
    assert float(expected.std()) > 0.1
    np.testing.assert_allclose(logits[..., :VOCAB].double(), expected, atol=2e-5)


def losses(world, parallel: dict[str, int]) -> float:
    from megacode.megatron.model import build_model
    from megacode.megatron.step import forward_backward
    from tests.megatron.test_initialize import batches

    settings = recipe(CRYSTAL, **parallel)
    sums = forward_backward(
        build_model(settings, VOCAB), batches(0), 1, settings, world, forward_only=True
    )
    return float(sums[0].sum())


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]
)
def test_scales_act_once_in_every_layout(layout) -> None:
    (expected,) = run_on(1, losses, {})
    got = sum(run_on(2, losses, layout, parallel=Parallel(**layout)))
    assert got / (1 if "pipeline" in layout else 2) == pytest.approx(expected, rel=1e-6)


def test_rates_by_role() -> None:
    """Crystal: every decoder matrix at 0.0625 of the rate; embeddings, norms and biases in full; decay on matrices only."""
    published = CRYSTAL.model_copy(
        update={"hidden_size": 4096, "heads": 32, "mup": Mup(base_hidden_size=256)}
    )
    matrix, vector = (
        torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in ((4, 4), (4,))
    )
    layer = "decoder.layers.7."
    for name in (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ):
        assert multipliers(recipe(published), layer + name + ".weight", matrix) == (0.0625, 1.0)
        assert multipliers(recipe(published), layer + name + ".bias", vector) == (1.0, 0.0)
    assert multipliers(recipe(published), "embedding.word_embeddings.weight", matrix) == (1.0, 1.0)
    assert multipliers(recipe(published), "output_layer.weight", matrix) == (1.0, 1.0)
    assert multipliers(recipe(published), layer + "mlp.linear_fc1.layer_norm_weight", vector) == (
        1.0,
        0.0,
    )
    plain = Model(layers=1, hidden_size=64, heads=4)
    assert mup_multiplier(plain, layer + "mlp.linear_fc1.weight", matrix) == 1.0
