"""A run killed (SIGKILL) while it writes a checkpoint: `latest` names the one before, and the run goes on from there as if
nothing had happened. What was half-written is never picked, and is cleared away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures

SAVED = (3, 6, 9)
SHORT = [
    part
    for setting in (
        "phases.first.steps=6", "phases.second.steps=3", "checkpoints.every=3", "checkpoints.keep_last=1",
        "checkpoints.keep_phase_ends=false", "evaluation.at_phase_end=false",
    )
    for part in ("--set", setting)
]  # fmt: skip

# `megacode` with the second checkpoint's writing cut off at a moment; signals go to the whole group, the forked writer too.
KILLED = """
import functools, os, shutil, signal, sys, torch
moment = sys.argv.pop(1)
from megacode.megatron import cpu
cpu.quiet()
if not torch.cuda.is_available(): cpu.install()
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megacode.cli import main as cli
from megacode.megatron import checkpoint

armed, written = False, 0
def die():
    os.killpg(0, signal.SIGKILL)

def at(when, module, name, matches):
    original = getattr(module, name)
    @functools.wraps(original)
    def hooked(*args, **kwargs):
        if armed and moment == when and matches(*args):
            die()
        return original(*args, **kwargs)
    setattr(module, name, hooked)

save, write_item = checkpoint.Checkpointer.save, filesystem_async._write_item
def hooked_save(self, step, *args):
    global armed
    self.wait()  # for the checkpoint before, which is to become complete
    armed = step == 6
    save(self, step, *args)
checkpoint.Checkpointer.save = hooked_save

@functools.wraps(write_item)  # its callers look at its signature
def hooked_write_item(transforms, stream, *args, **kwargs):
    global written
    written += 1
    if armed and written == 4 and moment == "half a shard":
        stream.write(b"half")
        stream.flush()
        die()
    return write_item(transforms, stream, *args, **kwargs)
filesystem_async._write_item = hooked_write_item

at("an empty folder", filesystem_async, "_write_item", lambda *_: True)
at("no description", checkpoint, "write_text", lambda path, _: path.name == checkpoint.INFO)
at("not renamed", os, "replace", lambda source, _: str(source).endswith(".tmp"))
at("not named by latest", checkpoint, "write_text", lambda path, _: path.name == checkpoint.LATEST)
at("the old one half removed", shutil, "rmtree", lambda path, **_: str(path).endswith(".old"))
sys.exit(cli.main(sys.argv[1:]))
"""

# moment: (checkpoint that `latest` names afterwards, complete ones, whether something half-written lies there)
MOMENTS = {
    "an empty folder": (3, [3], True),
    "half a shard": (3, [3], True),
    "no description": (3, [3], True),
    "not renamed": (3, [3], True),
    "not named by latest": (3, [3, 6], False),
    "the old one half removed": (6, [6], True),
}


@pytest.fixture(scope="module")
def straight(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    megacode("train", recipe, "--run", run, *SHORT, OMP_NUM_THREADS="1")
    return run


def visible(checkpoints: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_saves(moment: str, recipe: Path, straight: Path, tmp_path: Path) -> None:
    latest, complete, half_written = MOMENTS[moment]
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, moment, "train", str(recipe), "--run", str(run), *SHORT],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    assert killed.returncode == -9, f"was not killed while saving\n{killed.stdout}\n{killed.stderr}"
    assert (checkpoints / "latest").read_text() == f"step_{latest:08d}\n"
    assert visible(checkpoints) == complete
    assert bool(list(checkpoints.glob(".step_*"))) == half_written

    done = megacode("train", recipe, "--run", run, *SHORT, OMP_NUM_THREADS="1")
    assert f"continuing from {checkpoints / f'step_{latest:08d}'}" in done.stdout
    assert steps_of(run) == steps_of(straight)
    assert (checkpoints / "latest").read_text() == f"step_{SAVED[-1]:08d}\n"
    assert visible(checkpoints) == [SAVED[-1]]
    assert not list(checkpoints.glob(".step_*")), "what was half-written is still there"
