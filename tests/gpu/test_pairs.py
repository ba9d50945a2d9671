"""Training on pairs of code on CUDA: the losses of the CPU in every precision; on two devices those of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e.conftest import steps_of
from tests.e2e.test_pairs import STILL, numbers_of, recipe  # noqa: F401  # fixtures
from tests.gpu.common import engine_or_skip, fp8_or_skip, train
from tests.gpu.test_two_devices import train_on_two

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
SHAPE = [
    "model.hidden_size=128", "model.ffn_size=256", "phases.paired.learning_rate.peak=3e-4", "evaluation=null",
]  # fmt: skip
"""Whose matrices are multiples of 32, as FP8 wants them."""


def pair_losses(run: Path) -> list[float]:
    return [record["contrastive"] for record in numbers_of(run)]


@pytest.fixture(scope="module")
def on_cpu(recipe: Path) -> Path:
    """Folder of a run in fp32 and of the weights it started from."""
    cpu = {"CUDA_VISIBLE_DEVICES": ""}
    train(recipe, recipe.parent / "wide-start", *SHAPE, *STILL[1::2], **cpu)
    shared = [*SHAPE, f"initialize_from={recipe.parent / 'wide-start'}"]
    train(recipe, recipe.parent / "wide", *shared, **cpu)
    return recipe.parent


@pytest.mark.parametrize("compute", ["fp32", "bf16", "delayed", "tensorwise", "blockwise", "mxfp8"])
def test_cuda_finds_the_losses_of_the_cpu(
    compute: str, recipe: Path, on_cpu: Path, tmp_path: Path
) -> None:
    precision = f"precision={compute}"
    if compute not in ("fp32", "bf16"):
        fp8_or_skip(compute)
        precision = f"precision={{compute: fp8, fp8_recipe: {compute}}}"
    shared = [*SHAPE, f"initialize_from={on_cpu / 'wide-start'}", precision]
    train(recipe, tmp_path / "run", *shared)
    expected, got = steps_of(on_cpu / "wide"), steps_of(tmp_path / "run")
    close = {"fp32": 1e-3, "bf16": 2e-2}.get(compute, 0.1)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=close)
    np.testing.assert_allclose(pair_losses(tmp_path / "run"), pair_losses(on_cpu / "wide"), rtol=close)  # fmt: skip


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "layout",
    [["parallel.context=2"], ["parallel.tensor=2", "parallel.sequence=true", "parallel.overlap.tensor=false"], ["parallel.pipeline=2"], []],
    ids=["cp2", "tp2 sequence", "pp2", "dp2"],
)  # fmt: skip
def test_layouts_of_pairs_agree_with_one_device(
    layout: list[str], recipe: Path, on_cpu: Path, tmp_path: Path
) -> None:
    """In bf16, as context parallel attention wants it."""
    engine_or_skip()
    shared = [*SHAPE, f"initialize_from={on_cpu / 'wide-start'}", "precision=bf16"]
    train(recipe, tmp_path / "one", *shared)
    train_on_two(recipe, tmp_path / "two", *shared, *layout)
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert two.batches == one.batches
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)
    np.testing.assert_allclose(two.norms, one.norms, rtol=2e-2)
    np.testing.assert_allclose(pair_losses(tmp_path / "two"), pair_losses(tmp_path / "one"), rtol=1e-2)  # fmt: skip
