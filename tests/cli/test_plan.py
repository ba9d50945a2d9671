"""`megacode plan`: tables, JSON, a picture; from a cold start, without torch."""

import argparse
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megacode.cli import plan as plan_command
from megacode.errors import UserError

ROOT = Path(__file__).parents[2]


def run(*arguments):
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    return plan_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_largest_recipe_is_planned_at_once_and_without_torch():
    code = (
        "import argparse, sys\n"
        "from megacode.cli import plan as plan_command\n"
        "parser = argparse.ArgumentParser()\n"
        "plan_command.add_arguments(parser)\n"
        "plan_command.run(parser.parse_args(['recipes/crystal-7b.yaml', '--gpus', '64']))\n"
        "assert not {'torch', 'megatron.core', 'matplotlib'} & set(sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr
    assert seconds < 5, (
        "0.5 s of a quick core, 1.2 s of a busy one; a table with a row a step would take minutes"
    )
    for words in (
        "321,836 steps",
        "feed-forward",
        "vocabulary",
        "6,575,278,720",
        "225 saves",
        "344.8 B",
        "64 h100",
        "counted in full",
    ):
        assert words in done.stdout, words


def test_json_says_the_same(capsys):
    run(ROOT / "recipes/crystal-tiny.yaml", "--json", "--set", "model.vocab_size=1000")
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == sum(phase["steps"] for phase in plan["phases"])
    assert plan["phases"][1]["domains"]["code"] == pytest.approx(0.63, abs=0.001)
    assert plan["phases"][1]["streams"][0]["fim_rate"] == 0.9


def test_the_picture_is_drawn(tmp_path, capsys):
    run(ROOT / "recipes/crystal-tiny.yaml", "--plot", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    with pytest.raises(UserError, match="cannot be drawn"):
        run(ROOT / "recipes/crystal-tiny.yaml", "--plot", tmp_path / "plan.png/inside.png")


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="7 ranks cannot hold tensor 2 x pipeline 4"):
        run(
            ROOT / "recipes/crystal-7b.yaml",
            "--gpus",
            "7",
            "--set",
            "parallel={tensor: 2, pipeline: 4}",
        )


@pytest.mark.parametrize("wrong", [["--mfu", "2"], ["--gpus", "0"], ["--device", "abacus"]])
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        run("x.yaml", *wrong)


def test_ramps_and_given_weights_show(write, capsys):
    path = write()
    run(path, "--set", "phases.first.mixture.sources.docs={shape: linear, start: 2, end: 1}")
    out = capsys.readouterr().out
    assert "2 → 1" in out and "2.3 → 1.3" in out and "86.96 % → 76.92 %" in out


def test_what_a_suggestion_prints_can_be_typed_and_keeps_what_it_was_for(capsys):
    recipe = ROOT / "recipes/crystal-7b.yaml"
    run(
        recipe,
        "--gpus",
        8,
        "--device",
        "h100",
        "--suggest",
        "--set",
        "precision={compute: fp8, fp8_recipe: tensorwise}",
    )
    command = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  megacode plan")
    )
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == (
        "megacode",
        "plan",
    ) and "precision={compute: fp8, fp8_recipe: tensorwise}" in arguments
    run(*arguments)
    assert "fp8" in capsys.readouterr().out
