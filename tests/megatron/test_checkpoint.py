"""Which checkpoints stay, what `latest` may name, and what is refused with a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.good_recipe import GOOD

ROOT = Path(__file__).parents[2]
# Megatron-Core is imported by the module, so what is asked of it runs in a process of its own, redirected to the CPU.
PREAMBLE = """
import sys, torch
from pathlib import Path
from megacode.megatron import cpu
cpu.quiet()
if not torch.cuda.is_available(): cpu.install()
from megacode.errors import UserError
from megacode.recipe.schema import Checkpoints
from megacode.megatron.checkpoint import *
from megacode.run.checkpoints import *
folder = Path(sys.argv[1])
def made(*steps):
    for step in steps:
        (folder / checkpoint_name(step)).mkdir(parents=True)
        (folder / checkpoint_name(step) / INFO).write_text("{}")
def there(): return [step for step, _ in complete_checkpoints(folder)]
"""


def python(folder: Path, body: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + body, folder], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("settings", "kept", "newest", "left"),
    [
        ("keep_last=2", [], 50, [40, 50]),
        ("keep_last=1, keep_every=20", [], 50, [20, 40, 50]),
        ("keep_last=1", [30], 50, [30, 50]),
        ("keep_last=2", [], 40, [30, 40, 50]),
        ("keep_last=1, keep_every=30", [], 50, [20, 30, 50]),  # 20 is of another history
    ],
)
def test_what_stays(
    tmp_path: Path, settings: str, kept: list[int], newest: int, left: list[int]
) -> None:
    body = f"""
made(10, 20, 30, 40, 50)
Checkpointer(folder, Checkpoints({settings}), frozenset({kept}),
    is_own=lambda path: {settings!r} != "keep_last=1, keep_every=30" or path.name != checkpoint_name(20))._forget_old({newest})
print(there())
"""
    assert python(tmp_path, body) == str(left)


def test_a_damaged_file_is_not_called_another_model(tmp_path: Path) -> None:
    body = """
from torch.distributed.checkpoint.api import CheckpointException
from megacode.megatron import checkpoint
made(10, 20)
damage, other = RuntimeError("PytorchStreamReader failed: no end. Long advice"), RuntimeError("Missing key: decoder.a")
for error in (damage, other, ValueError("Cannot merge two lists (2 and 3, at level ('optimizer', 'param_groups'))")):
    print(checkpoint._why_not(folder / checkpoint_name(20), CheckpointException("", {1: (error, None)})))
"""
    body += f"""
from types import SimpleNamespace as Of
(folder / checkpoint_name(20) / "recipe.yaml").write_text({GOOD!r})
for before, here, stored in ((3, 1, 256), (1, 3, 384), (1, 3, 512)):
    chunk = Of(config=Of(tensor_model_parallel_size=here, ffn_hidden_size=stored))
    print(checkpoint._other_padding(folder / checkpoint_name(20), {{"layout": {{"tensor": before}}}}, [chunk]))
"""
    damaged, other, groups, wider, narrower, another = python(tmp_path, body).splitlines()
    assert (
        "damaged (PytorchStreamReader failed: no end);" in damaged
        and "another (step_00000010) into" in damaged
    )
    assert "Missing key: decoder.a; the model section" in other
    assert "other optimizer.groups or another model.mup" in groups
    assert (
        "stores model.ffn_size 192 as 384, and 1 stores it as 256; set `model.pad_multiple: 384`"
        in wider
    )
    assert "256 cannot be split over 3 ranks: use a parallel.tensor" in narrower
    assert another == "None"


def test_what_is_written_can_be_read_by_everyone(tmp_path: Path) -> None:
    """16-bit weights for FP8 ones, whole master weights for remainders; what a load asks for is left as it is."""
    body = """
from types import SimpleNamespace as Of
from megacode.megatron import checkpoint, workarounds
from megacode.megatron.optimizer_state import split
fp8, plain, masters = torch.ones(2), torch.ones(2), torch.randn(4)
weight, remainder = split(masters)
checkpoint._format, checkpoint._data_parallel_group = dict, lambda: None
workarounds.is_float8tensor = lambda tensor: tensor is fp8
workarounds.dequantize_fp8_tensor = lambda tensor: 2 * tensor
for loading in (False, True):
    model = {"a": Of(data=fp8), "b": {"c": Of(data=plain)}, "d": 3}
    kept = {"param_state": {0: {"param": Of(data=remainder.float())}}}
    lean = Of(
        optimizer=Of(store_param_remainders=True), buffers=[Of(param_index_map={weight: None})],
        config=Of(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True), sharded_state_dict=lambda *_, **__: kept,
    )
    checkpoint._sharded_state([Of(sharded_state_dict=lambda metadata: model)], lean, loading)
    print(model["a"].data.tolist(), model["b"]["c"].data.tolist(), torch.equal(kept["param_state"][0]["param"].data, masters))
"""
    assert python(tmp_path, body).splitlines() == [
        "[2.0, 2.0] [1.0, 1.0] True",
        "[1.0, 1.0] [1.0, 1.0] False",
    ]
