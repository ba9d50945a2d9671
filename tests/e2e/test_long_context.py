"""A phase with longer sequences and rotary positions of its own: resumed, exported and evaluated as it was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megacode.run.metrics import read_metrics
from tests.e2e.conftest import ROOT, megacode, steps_of

LONG = """
extends: small.yaml
phases:
  first: {steps: 4}
  second:
    steps: 6
    sequence_length: 64
    rotary_base: 200000
    rotary_scaling: {kind: yarn, factor: 4, original_context_length: 32}
evaluation: {samples: 8, at_phase_end: true}
sources: {code: {window: 64}, text: {window: 64}, web: {window: 64}}
"""
TRAIN_PART = """
import sys
from megacode import Trainer, load_recipe
with Trainer(load_recipe(sys.argv[1]), sys.argv[2]) as trainer:
    trainer.train(end_step=int(sys.argv[3]))
    print(*(loss for loss, _ in trainer.evaluate().values()), sep="\\n")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe_file(recipe: Path) -> Path:
    path = recipe.with_name("long.yaml")
    path.write_text(LONG)
    return path


@pytest.fixture(scope="module")
def straight(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("long") / "run"
    megacode("train", recipe_file, "--run", run)
    return run


def train_part(recipe_file: Path, run: Path, end: int) -> list[float]:
    """Train to step `end` in a process of its own; validation losses there."""
    command = [sys.executable, "-c", TRAIN_PART, str(recipe_file), str(run), str(end)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()[-2:]]


def test_a_resumed_phase_has_its_rotary_positions(
    recipe_file: Path, straight: Path, tmp_path: Path
) -> None:
    records = read_metrics(straight)
    at = {
        r["step"]: list(r["loss_by_source"].values()) for r in records if r["kind"] == "validation"
    }
    assert train_part(recipe_file, tmp_path / "run", 4) == at[4]
    assert train_part(recipe_file, tmp_path / "run", 4) == at[4], "evaluated in the next phase's"
    train_part(recipe_file, tmp_path / "run", 7)
    assert train_part(recipe_file, tmp_path / "run", 10) == at[10]
    assert steps_of(tmp_path / "run") == steps_of(straight)
    plain = (
        "--set",
        "phases.second.rotary_base=null",
        "--set",
        "phases.second.rotary_scaling=null",
    )
    megacode("train", recipe_file, "--run", tmp_path / "plain", *plain)
    losses = steps_of(straight).losses, steps_of(tmp_path / "plain").losses
    assert losses[0][:4] == losses[1][:4]
    assert all(abs(a - b) > 1e-5 for a, b in zip(losses[0][4:], losses[1][4:], strict=True))


OPEN = """
import sys
from pathlib import Path
from types import SimpleNamespace
from megacode.megatron import inference
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import TokenizerSection

inference.load_tokenizer = lambda section: SimpleNamespace(vocab_size=300)
named = {"tokenizer": TokenizerSection(path="none.model")}
inference.load_recipe = lambda path: load_recipe(path).model_copy(update=named)
_, _, model = inference.open_for_inference(Path(sys.argv[1]))
print(model.rotary_pos_emb.inv_freq[-1].item(), model.config.yarn_rotary_scaling_factor)
"""


@pytest.mark.parametrize(("step", "slowest", "factor"), [(4, 1e4, 1.0), (10, 2e5, 4.0)])
def test_a_checkpoint_is_evaluated_with_those_of_its_phase(
    step: int, slowest: float, factor: float, straight: Path
) -> None:
    checkpoint = straight / "checkpoints" / f"step_{step:08d}"
    command = [sys.executable, "-c", OPEN, str(checkpoint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = list(map(float, done.stdout.split()[-2:]))
    # The last of six pairs turns least: by base ** (-5 / 6), and yarn divides it.
    assert found == pytest.approx([slowest ** (-5 / 6) / factor, factor])


def test_an_export_has_those_of_its_checkpoint(straight: Path, tmp_path: Path) -> None:
    for step, wanted in {
        4: {"max_position_embeddings": 32, "rope_theta": 10000},
        10: {
            "max_position_embeddings": 128,
            "rope_theta": 200000,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
    }.items():  # fmt: skip
        checkpoint = straight / "checkpoints" / f"step_{step:08d}"
        megacode("export", checkpoint, tmp_path / str(step), "--format", "llama")
        config = json.loads((tmp_path / str(step) / "config.json").read_text())
        names = ("max_position_embeddings", "rope_theta", "rope_scaling")
        assert {name: config[name] for name in names if name in config} == wanted


def test_a_past_phase_keeps_them_and_the_plan_shows_them(recipe_file: Path, straight: Path) -> None:
    done = megacode(
        "train", recipe_file, "--run", straight, "--set", "phases.second.rotary_base=3e5", check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert "phases.second.rotary_base: 200000 before, 300000 now" in done.stderr
    assert "yarn x 4 of 32" in megacode("plan", recipe_file).stdout
