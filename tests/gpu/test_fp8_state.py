"""What FP8 keeps between steps goes through a checkpoint: scales and maxima, parameters in FP8."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e.conftest import corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
from tests.gpu.common import LOW_RATE, WIDE, fp8_or_skip, options, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("kind", ["delayed", "tensorwise"])
def test_a_resumed_fp8_run_goes_on_as_if_not_stopped(
    kind: str, recipe: Path, tmp_path: Path
) -> None:
    """The scales of `delayed` come from maxima of earlier steps: they are in the checkpoint, or step 9 would differ by 8e-4."""
    fp8_or_skip(kind)
    precision = f"precision={{compute: fp8, fp8_recipe: {kind}, fp8_amax_history: 16}}"
    changes = (*WIDE, *LOW_RATE, precision, "checkpoints.every=4")
    same = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(recipe, straight, *changes, **same)
    sets = options(changes)
    megacode("train", recipe, "--run", stopped, "--until-phase", "first", *sets, **same)
    train(recipe, stopped, *changes, **same)
    expected, got = steps_of(straight), steps_of(stopped)
    assert got.batches == expected.batches
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-3)
    np.testing.assert_allclose(got.losses[:10], expected.losses[:10], rtol=1e-4)


def test_fp8_parameters_train_as_fp8_products_do(recipe: Path, tmp_path: Path) -> None:
    """Their checkpoint holds 16-bit weights: the run goes on from it, with FP8 parameters or in bf16."""
    fp8_or_skip("tensorwise")
    in_fp8, products = (
        f"precision={{compute: fp8, fp8_recipe: tensorwise, fp8_params: {params}}}"
        for params in ("true", "false")
    )
    changes = (*WIDE, *LOW_RATE)
    train(recipe, tmp_path / "parameters", *changes, in_fp8)
    train(recipe, tmp_path / "products", *changes, products)
    sets = options((*changes, in_fp8))
    megacode("train", recipe, "--run", tmp_path / "stopped", "--until-phase", "first", *sets)
    shutil.copytree(tmp_path / "stopped", tmp_path / "bf16")
    train(recipe, tmp_path / "stopped", *changes, in_fp8)
    train(recipe, tmp_path / "bf16", *changes, "precision=bf16")
    expected = steps_of(tmp_path / "parameters").losses
    for name in ("products", "stopped", "bf16"):
        np.testing.assert_allclose(
            steps_of(tmp_path / name).losses, expected, rtol=2e-3, err_msg=name
        )
