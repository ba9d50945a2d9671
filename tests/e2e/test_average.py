"""Means of checkpoints and the EMA of weights: right by numpy, in any layout, over a resume, and usable like any checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megacode.convert.checkpoint_reader import CheckpointReader
from megacode.megatron.checkpoint_index import EMA
from tests.e2e.conftest import megacode, steps_of

pytestmark = pytest.mark.slow

DECAY = 0.8
MASTER = "optimizer.state.param."
BUCKETS = ("parallel.overlap.grad_reduce=true", "parallel.ddp.bucket_size=3000")
"""Of gradients, several and padded, each of which the two ranks share."""
SHORT = [
    part
    for setting in (
        "phases.first.steps=3", "phases.second.steps=3", "checkpoints.every=1", "checkpoints.keep_last=9",
        "evaluation.at_phase_end=false",
    )
    for part in ("--set", setting)
]  # fmt: skip


def train(
    recipe: Path, run: Path, *settings: str, ranks: int = 1, until: str | None = None, code: int = 0
) -> str:
    given = [part for setting in settings for part in ("--set", setting)]
    stop = ["--until-phase", until] if until else []
    done = megacode(
        "train", recipe, "--run", run, *SHORT, *given, *stop, ranks=ranks, check=code == 0
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def tensors(checkpoint: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors whose name begins with `prefix`, by the names of weights; without it the weights."""
    reader = CheckpointReader.open(checkpoint)
    return {
        name.removeprefix(prefix): reader.tensor(name).float().numpy().copy()
        for name, about in reader.metadata.state_dict_metadata.items()
        if hasattr(about, "chunks")
        and (name.startswith(prefix) if prefix else not name.startswith("optimizer."))
    }


def step(run: Path, number: int) -> Path:
    return run / f"checkpoints/step_{number:08d}"


def check_ema(run: Path, before: dict[str, np.ndarray], first: int, last: int, master: str) -> None:
    """The averages of steps `first` to `last` against numpy's, from `before` on."""
    for number in range(first, last + 1):
        masters, got = tensors(step(run, number), master), tensors(step(run, number), EMA)
        assert got.keys() == before.keys() and masters.keys() >= got.keys()
        for name, average in before.items():
            before[name] = np.float32(DECAY) * average + np.float32(1 - DECAY) * masters[name]
            np.testing.assert_allclose(got[name], before[name], rtol=2e-6, atol=1e-8, err_msg=name)
            assert number < 6 or not np.array_equal(got[name], masters[name]), name


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two data-parallel ranks."""
    run = tmp_path_factory.mktemp("average") / "run"
    train(recipe, run, f"optimizer.ema={DECAY}", *BUCKETS, ranks=2)
    return run


@pytest.fixture(scope="module")
def mean(run: Path) -> Path:
    told = megacode("average", run, "--steps", "3,6,4").stdout
    assert "averages/step_00000006-mean-of-3: mean of the weights of 3 checkpoints" in told
    return run / "averages/step_00000006-mean-of-3"


def test_a_mean_is_numpys_and_says_what_it_was_made_of(run: Path, mean: Path) -> None:
    of, got = [tensors(step(run, number)) for number in (3, 4, 6)], tensors(mean)
    assert got.keys() == of[0].keys() and len(got) > 8
    for name, values in got.items():
        expected = np.mean([one[name].astype(np.float64) for one in of], axis=0)
        np.testing.assert_array_equal(values, expected.astype(np.float32), err_msg=name)
    info = json.loads((mean / "megacode.json").read_text())
    assert info["average"] == {"run": str(run), "steps": [3, 4, 6], "weights": "raw"}
    assert info["step"] == 6 and "facts" not in info


def test_a_mean_is_a_checkpoint_for_all_but_a_resume(
    run: Path, mean: Path, recipe: Path, tmp_path: Path
) -> None:
    new, start = tmp_path / "new", f"initialize_from={mean}"
    assert f"weights from {mean}" in train(recipe, new, start, "precision=bf16")
    assert len(steps_of(new).losses) == 6
    into, clash = tmp_path / "other/checkpoints", tmp_path / "clash"
    shutil.copytree(mean, into / mean.name.partition("-")[0])
    told = train(recipe, into.parent, code=2)
    assert "step_00000006: holds weights alone" in told and "initialize_from" in told
    shutil.copytree(mean, clash)
    told = train(recipe, clash, code=2)
    assert f"{clash}: is a checkpoint, not a run's folder" in told
    assert {path.name for path in clash.iterdir()} == {path.name for path in mean.iterdir()}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["--last", "9"], "the run has 6 checkpoints (steps: 1, 2, 3, 4, 5, 6); ask for fewer"),
        (["--steps", "3,7"], "has no checkpoint at step 7; there are: 1, 2, 3, 4, 5, 6"),
        (["--steps", "3,4,6"], "already there"),
        (["--steps", "3-6"], "expected whole numbers split by commas"),
        ([], "--last --steps"),
    ],
)
def test_what_cannot_be_averaged_is_told(
    run: Path, mean: Path, wanted: list[str], words: str
) -> None:
    before = sorted(run.rglob("*"))
    done = megacode("average", run, *wanted, check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert sorted(run.rglob("*")) == before


# --------------------------------------------------------------------------------------------- EMA


def test_the_ema_begins_with_the_first_weights_and_follows_numpy(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    """Weights to begin with are those that a checkpoint of an EMA holds."""
    megacode("average", run, "--last", "1", "--weights", "ema", "--output", tmp_path / "ema")
    first = tensors(tmp_path / "ema")
    kept = tensors(step(run, 6), EMA)
    assert first.keys() == kept.keys()
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
    new = tmp_path / "new"
    train(recipe, new, f"initialize_from={tmp_path / 'ema'}", f"optimizer.ema={DECAY}")
    check_ema(new, first, 1, 6, MASTER)


@pytest.mark.parametrize(
    ("settings", "master"),
    [
        (["precision=bf16"], MASTER),
        (["precision=bf16", *BUCKETS], MASTER),
        (["precision=bf16", "parallel.distributed_optimizer=false"], "optimizer.state.fp32_param."),
        (["parallel.pipeline=2", "model.tie_embeddings=true"], MASTER),
        (["parallel.tensor=2", "parallel.distributed_optimizer=false"], ""),
    ],
)  # fmt: skip
def test_the_ema_is_that_of_the_masters_in_every_layout(
    recipe: Path, tmp_path: Path, settings: list[str], master: str
) -> None:
    train(recipe, tmp_path, f"optimizer.ema={DECAY}", *settings, ranks=2)
    check_ema(tmp_path, tensors(step(tmp_path, 1), EMA), 2, 6, master)


def test_a_resumed_ema_is_the_same_bit_for_bit_and_loads_in_another_layout(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    ema, again, other = f"optimizer.ema={DECAY}", tmp_path / "again", tmp_path / "other"
    train(recipe, again, ema, *BUCKETS, ranks=2, until="first")
    shutil.copytree(again, other)
    train(recipe, again, ema, *BUCKETS, ranks=2)
    expected, got = tensors(step(run, 6), EMA), tensors(step(again, 6), EMA)
    assert all(np.array_equal(expected[name], got[name]) for name in expected)
    train(recipe, other, ema, "parallel.pipeline=2", "parallel.distributed_optimizer=true", ranks=2)
    check_ema(other, tensors(step(other, 3), EMA), 4, 6, MASTER)
    for name, values in tensors(step(other, 6), EMA).items():
        np.testing.assert_allclose(values, expected[name], atol=2e-4, err_msg=name)


def test_one_rank_and_two_have_the_same_ema(run: Path, recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path, f"optimizer.ema={DECAY}")
    one, two = tensors(step(tmp_path, 6), EMA), tensors(step(run, 6), EMA)
    for name, values in two.items():
        np.testing.assert_allclose(one[name], values, atol=2e-4, err_msg=name)


def test_every_and_on_and_off_at_a_resume(recipe: Path, tmp_path: Path) -> None:
    on, off, keys = tmp_path / "on", tmp_path / "off", ("--accept-change", "optimizer.ema")
    setting = f"optimizer.ema={{decay: {DECAY**0.5}, every: 2}}"
    train(recipe, on, until="first")
    assert "optimizer.ema.decay: not given before" in train(recipe, on, setting, code=2)
    told = megacode("train", recipe, "--run", on, *SHORT, "--set", setting, *keys).stdout
    assert "step_00000003 has none; it begins with these weights" in told
    average = tensors(step(on, 3), MASTER)
    check_ema(on, average, 4, 4, MASTER)  # a rate of 0: the second phase warms up
    four, five = tensors(step(on, 4), EMA), tensors(step(on, 5), EMA)
    assert all(np.array_equal(five[name], four[name]) for name in five)
    check_ema(on, average, 6, 6, MASTER)
    done = megacode("average", on, "--steps", "3", "--weights", "ema", check=False)
    assert done.returncode == 2 and "step_00000003: has no EMA of its weights" in done.stderr
    shutil.copytree(on, off)
    shutil.rmtree(step(off, 6))
    (off / "checkpoints/latest").write_text("step_00000005\n")
    told = megacode("train", recipe, "--run", off, *SHORT, *keys).stdout
    assert "the one in" in told and "is dropped" in told
    assert not tensors(step(off, 6), EMA) and steps_of(off).losses == steps_of(on).losses
