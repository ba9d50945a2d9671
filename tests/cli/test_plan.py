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


# ------------------------------------------------------------------------------------ two recipes


ORDERS = {  # arXiv 2309.16298: four equal phases, of which the share of code differs
    "uniform": (0.4, 0.4, 0.4, 0.4),
    "increase": (0.1, 0.3, 0.5, 0.7),
    "decrease": (0.7, 0.5, 0.3, 0.1),
}


def ordered(write, name, shares, steps=25):
    """A recipe of phases with these shares of code."""
    phases = "".join(
        f"  - {{name: p{number}, steps: {steps}, batch_size: 10, sequence_length: 32, learning_rate: {{peak: 1e-3}}, "
        f"mixture: {{sources: {{python: {share}, docs: {1 - share:.4g}}}}}}}\n"
        for number, share in enumerate(shares, 1)
    )
    return write(
        f"name: {name}\nmodel: {{layers: 2, hidden_size: 32, heads: 2, vocab_size: 300}}\nsources:\n"
        "  python: {path: p, domain: code, tokens: 32k}\n  docs: {path: d, tokens: 64k}\n"
        f"phases:\n{phases}",
        f"{name}.yaml",
    )


@pytest.mark.parametrize("other", ["increase", "decrease"])
def test_orders_of_the_same_totals_are_equal_to_the_token(write, capsys, other):
    a, b = (ordered(write, name, ORDERS[name]) for name in ("uniform", other))
    assert run(a, b, "--compare") == 0
    told = capsys.readouterr().out
    assert "totals of all 2 sources are equal to the token; the order differs in 2" in told
    row = next(line.split() for line in told.splitlines() if line.split()[:1] == ["python"])
    assert row[:5] == ["python", "400", "400", "12,800", "12,800"] and row[5] == row[6] != "0"
    assert row[7:] == ["equal", "differs"]
    phases = next(line for line in told.splitlines()[::-1] if line.split()[:1] == ["python"])
    assert phases.split()[1] == {"increase": "800", "decrease": "5,600"}[other]
    assert run(a, b, "--compare", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals_equal"] and not found["order_equal"]
    docs = found["sources"]["docs"][0]
    assert docs == {"sequences": 600, "tokens": 19_200, "epochs": pytest.approx(0.3, rel=0.01)}


def test_the_same_order_in_fewer_phases_is_equal(write, capsys):
    a, b = ordered(write, "four", (0.4,) * 4), ordered(write, "one", (0.4,), steps=100)
    run(a, b, "--compare")
    assert "equal to the token, also at every end of a phase" in capsys.readouterr().out


def test_totals_that_differ_are_told_by_source(write, capsys):
    a, b = ordered(write, "less", (0.4, 0.4)), ordered(write, "more", (0.4, 0.5))
    assert run(a, b, "--compare") == 0
    told = capsys.readouterr().out
    assert "totals differ in 2 of 2 sources: python, docs" in told
    assert "+800" in told and "-800" in told
    run(a, a, "--compare", "--set", "phases.p1.steps=20")
    assert "A is less: 45 steps" in (told := capsys.readouterr().out) and "B is less: 45" in told


@pytest.mark.parametrize("given", [["b", "--compare", "--gpus", "8"], ["b"], ["--compare"]])
def test_a_comparison_of_less_or_more_is_refused(write, given):
    files = {name: ordered(write, name, (0.4,)) for name in "ab"}
    with pytest.raises(UserError, match="--compare: "):
        run(files["a"], *(files.get(word, word) for word in given))
