"""What `megacode evaluate` says when a checkpoint's recipe does not fit the data that is there (any more)."""

import subprocess
import sys
from pathlib import Path

from tests.data.conftest import numbered, write_shard

ROOT = Path(__file__).parents[2]
RECIPE = """
name: short
model: {{layers: 1, hidden_size: 8, heads: 1, vocab_size: 1000}}
sources: {{a: {{path: {folder}/a, validation: {folder}/a}}}}
phases:
  - name: only
    steps: 20
    batch_size: 8
    sequence_length: 16
    mixture: {{sources: {{a: {{weight: 1, max_epochs: 2}}}}}}
    learning_rate: {{schedule: constant, peak: 0.001}}
"""
# The model is not what this is about: opening it is replaced.
EVALUATE = """
import sys
from megacode.megatron import distributed, inference
from megacode.recipe.load import load_recipe
from megacode.megatron import cpu
import torch
cpu.quiet()
if not torch.cuda.is_available(): cpu.install()
inference.open_for_inference = lambda folder: (load_recipe(folder / "recipe.yaml"), None, None)
distributed.current_world = lambda: None
from megacode.cli.main import main
sys.exit(main(["evaluate", sys.argv[1]]))
"""


def test_a_plan_that_cannot_be_names_the_checkpoint_s_recipe(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", numbered(200))
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    (checkpoint / "megacode.json").write_text('{"step": 1}')
    (checkpoint / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, checkpoint], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "max_epochs" in done.stderr, done.stderr
    assert f"{checkpoint / 'recipe.yaml'}: phases" in done.stderr and "Traceback" not in done.stderr
