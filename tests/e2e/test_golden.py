"""Golden numbers: the tiny recipe's batches and losses, as they were when they were last looked at.

The recipe is recipes/crystal-tiny.yaml itself: its model, its phases, its schedules. Its steps and warm-ups are scaled down to
thirty, which cross all three phases, and its corpora, which come from the Python installation and so differ between machines,
are replaced by made ones, with bytes as tokens so that fill-in-the-middle cuts characters as it does there.

Batches are integers and equal everywhere. Losses are compared to the last bit where torch and the processor are those of the
file, within 1e-5 elsewhere (other kernels add in another order: with the same instruction set, one vendor's from another's).
After an intended change:

    python -m pytest tests/e2e/test_golden.py --write-golden
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e.conftest import ROOT, build_corpora, documents, megacode, steps_of

GOLDEN = Path(__file__).with_name("golden.json")
BOS, EOD = 256, 257

RECIPE = f"""
extends: {ROOT}/recipes/crystal-tiny.yaml
tokenizer: {{path: bytes.tiktoken}}
sources:
  python: {{path: python, validation: python_valid}}
  docs: {{path: docs, validation: docs_valid}}
phases:
  phase1: {{steps: 7, learning_rate: {{warmup: 3, decay_steps: 23}}}}
  phase2: {{steps: 17, learning_rate: {{warmup: 2}}}}
  phase3: {{steps: 6, learning_rate: {{warmup: 2}}}}
evaluation: {{samples: 4}}
logging: {{every: 1, tensorboard: false}}
"""


def framed(seed: int, count: int, low: int, high: int) -> list[list[int]]:
    """Documents of printable ASCII, between begin and end as the recipe's tokenizer section says."""
    return [[BOS, *document[:-1], EOD] for document in documents(seed, count, low, high)]


def byte_corpora(folder: Path) -> None:
    """Corpora for the tiny recipes' two sources, and a tokenizer whose tokens are bytes."""
    build_corpora(
        folder,
        {
            "python": framed(1, 500, 33, 90), "python_valid": framed(2, 40, 33, 90),
            "docs": framed(3, 500, 60, 127), "docs_valid": framed(4, 40, 60, 127),
        },
    )  # fmt: skip
    ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "bytes.tiktoken").write_text("".join(ranks))
    described = {"pattern": r"[\s\S]", "special_tokens": {"<s>": BOS, "</s>": EOD}}
    (folder / "bytes.tiktoken.json").write_text(json.dumps(described))


@pytest.fixture
def golden_recipe(tmp_path: Path) -> Path:
    byte_corpora(tmp_path)
    path = tmp_path / "golden.yaml"
    path.write_text(RECIPE)
    return path


def processor() -> str:
    """What matrix libraries choose their kernels by: instruction set, vendor, family and model."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = [said.get(key, "?") for key in ("vendor_id", "cpu family", "model")]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *known])


@pytest.mark.slow
def test_the_tiny_recipe_trains_as_it_did(
    golden_recipe: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("tiktoken")
    megacode("train", golden_recipe, "--run", tmp_path / "run", OMP_NUM_THREADS="1")
    got = steps_of(tmp_path / "run")
    machine = {"torch": torch.__version__.split("+")[0], "processor": processor()}
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(
            json.dumps({**machine, "losses": got.losses, "batches": got.batches}, indent=1) + "\n"
        )
    golden = json.loads(GOLDEN.read_text())
    assert got.batches == golden["batches"]
    if all(golden[key] == value for key, value in machine.items()):
        assert got.losses == golden["losses"]
    else:
        np.testing.assert_allclose(got.losses, golden["losses"], rtol=1e-5)
