"""Where weights are gathered late, what reads them in between (checkpoint, evaluation) still sees those of the last update."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megacode.errors import UserError
from megacode.train.profile import ProfileSteps
from tests.e2e.conftest import megacode, steps_of

OVERLAP = ("--set", "parallel.overlap={grad_reduce: true, param_gather: true}")


@pytest.mark.slow
def test_a_run_with_late_weights_resumes_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    megacode("train", recipe, "--run", straight, *OVERLAP, ranks=2)
    megacode(
        "train",
        recipe,
        "--run",
        stopped,
        *OVERLAP,
        "--until-phase",
        "first",
        "--profile",
        "3:4",
        ranks=2,
    )
    megacode("train", recipe, "--run", stopped, *OVERLAP, ranks=2)
    plain = tmp_path / "plain"
    megacode("train", recipe, "--run", plain, ranks=2)
    for name, expected in weights(
        plain
    ).items():  # a rank's own share alone would be right in a stale one
        np.testing.assert_allclose(
            weights(straight)[name], expected, rtol=1e-4, atol=1e-6, err_msg=name
        )
    assert steps_of(stopped) == steps_of(straight)
    assert validations(stopped) == validations(straight)
    check_profile(stopped / "profile" / "steps-3-4")


def weights(run: Path) -> dict[str, np.ndarray]:
    """Of the model after step 10, by name: there no evaluation went before, which would have gathered them."""
    from megacode.convert.checkpoint_reader import CheckpointReader

    reader = CheckpointReader.open(run / "checkpoints" / "step_00000010")
    names = [
        n
        for n in reader.metadata.state_dict_metadata
        if not n.startswith("optimizer") and n.endswith("weight")
    ]
    return {name: reader.tensor(name).numpy() for name in names}


def validations(run: Path) -> list[dict]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss_by_source"] for record in records if record["kind"] == "validation"]


def check_profile(folder: Path) -> None:
    """A trace of rank 0 alone; nothing of megacode's asks a tensor for a number."""
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-0.txt"]
    text = (folder / "rank-0.txt").read_text()
    assert "Self CPU" in text
    asked = text.split("Who asked")[1].strip().splitlines()[1:]
    assert any("megatron/core/optimizer/clip_grads" in line for line in asked), asked
    assert not [line for line in asked if "megacode/" in line]
    assert "threading" not in text.split("Where the host")[0], "operations, not the stack"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--profile", "5"), "--profile: expected FIRST:LAST"),
        (("--profile", "5:4"), "--profile: expected FIRST:LAST"),
        (("--profile", "0:4"), "counted from 1"),
        (
            ("--profile", "1:4", "--profile-ranks", "x"),
            "--profile-ranks: expected ranks such as 0,3 or `all`",
        ),
        (
            ("--profile", "1:4", "--profile-ranks", "0,1"),
            "--profile-ranks: there is no rank 1 among 1 process",
        ),
        (("--profile", "21:24"), "--profile 21:24: this start ends with step 20"),
        (
            ("--profile", "9:12", "--until-phase", "first"),
            "--profile 9:12: this start ends with step 8",
        ),
    ],
)
def test_profiles_that_cannot_be_are_a_sentence(
    arguments: tuple[str, ...],
    says: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megacode.cli.main import main

    assert main(["train", str(recipe), "--run", str(tmp_path / "run"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_profile_is_named_by_the_steps_that_were(tmp_path: Path) -> None:
    """The run ends, or is stopped, before the last of those that were asked for."""
    from megacode.train.profile import Profiler

    said: list[str] = []
    world = SimpleNamespace(rank=0, is_main=True, device=torch.device("cpu"))
    profiler = Profiler(ProfileSteps(3, 9), tmp_path, world, said.append)
    for step in range(4):
        profiler.before(step)
        torch.ones(2).sum()
        profiler.after(step)
    profiler.close()
    assert [path.name for path in tmp_path.iterdir()] == ["steps-3-4"]
    assert "time of their own, 2 steps." in (tmp_path / "steps-3-4/rank-0.txt").read_text()
    assert said == [f"profile of steps 3 to 4: {tmp_path / 'steps-3-4'}"]


def test_steps_that_are_done_are_not_profiled_in_silence() -> None:
    ProfileSteps(8, 9).check(done=8, until=20, processes=1)
    with pytest.raises(
        UserError, match="7:8: these steps are done, and this start goes on with step 9"
    ):
        ProfileSteps(7, 8).check(done=8, until=20, processes=1)
