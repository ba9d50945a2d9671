"""Every parallel layout trains the same model on the same batches: losses and gradient norms equal within 1e-5 (fp32)."""

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import megacode, steps_of

LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2", "parallel.distributed_optimizer=false"]),
    "tp2 distributed optimizer": (2, ["parallel.tensor=2"]),
    "sequence parallel": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "interleaved pp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "dp2": (2, ["parallel.distributed_optimizer=false"]),
    "dp2 distributed optimizer": (2, []),
    "dp2 overlapped": (2, ["parallel.overlap={grad_reduce: true, param_gather: true}"]),
    "tp2 pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "recomputed, dp2": (2, ["parallel.recompute.granularity=full"]),
}


@pytest.fixture(scope="session")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps in one process, from a checkpoint that the other layouts start from too."""
    folder = tmp_path_factory.mktemp("single")
    # A run of one step at rate ~0 leaves a checkpoint of initial weights.
    megacode("train", recipe, "--run", folder / "start", "--set", "phases.first.steps=1", "--set", "phases.second.steps=1",
             "--set", "phases.first.learning_rate.peak=1e-30", "--set", "phases.second.learning_rate.peak=1e-30",
             "--set", "optimizer.weight_decay=0")  # fmt: skip
    megacode(
        "train", recipe, "--run", folder / "run", "--set", f"initialize_from={folder / 'start'}"
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, recipe: Path, single: Path, tmp_path: Path) -> None:
    processes, settings = LAYOUTS[layout]
    changes = [part for setting in settings for part in ("--set", setting)]
    megacode("train", recipe, "--run", tmp_path / "run",
             "--set", f"initialize_from={single / 'start'}", *changes, ranks=processes)  # fmt: skip
    expected, got = steps_of(single / "run"), steps_of(tmp_path / "run")
    assert got.batches == expected.batches
    assert len(got.losses) == 20 and got.losses[-1] < 0.95 * got.losses[0], (
        "the model does not learn"
    )
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=1e-5)
