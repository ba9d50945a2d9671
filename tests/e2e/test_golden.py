"""Golden numbers: the small recipe's batches and losses, as they were when they were last looked at.

Batches are integers and equal everywhere. Losses are compared to the last bit where torch and the processor's instruction set
are those of the file, within 1e-5 elsewhere (other kernels add in another order). After an intended change:

    python -m pytest tests/e2e/test_golden.py --write-golden
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e.conftest import megacode, steps_of

GOLDEN = Path(__file__).with_name("golden.json")


@pytest.mark.slow
def test_the_small_recipe_trains_as_it_did(recipe: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    megacode("train", recipe, "--run", tmp_path / "run", "--set", "parallel.tensor=1", OMP_NUM_THREADS="1")
    got = steps_of(tmp_path / "run")
    machine = {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps({**machine, "losses": got.losses, "batches": got.batches}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert got.batches == golden["batches"]
    if all(golden[key] == value for key, value in machine.items()):
        assert got.losses == golden["losses"]
    else:
        np.testing.assert_allclose(got.losses, golden["losses"], rtol=1e-5)
