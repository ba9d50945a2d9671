"""The README's commands, run as they stand there (fewer steps): quickstart first, then what it offers next."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megacode import quickstart
from tests.e2e.conftest import ROOT

SHORT = [part for phase in ("phase1", "phase2", "phase3") for part in ("--set", f"phases.{phase}.steps=3")]
SHORT += ["--set", "evaluation.samples=8"]


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "110"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def readme_commands() -> list[str]:
    """Lines of the README's section "Then" that call megacode."""
    section = (ROOT / "README.md").read_text().split("## Then")[1].split("```")[1]
    return [line.split("#")[0].strip() for line in section.splitlines() if line.startswith("megacode ")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    out = run(folder, sys.executable, "-m", "megacode.quickstart", *SHORT)
    assert "starting crystal-tiny" in out and "finished: 9 steps" in out and "report.html" in out
    return folder


def test_processes_that_cannot_be_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, told in ((("--pp", "0"), "at least 1"), (("--tp", "0"), "at least 1"), (("--pp", "3"), "no multiple")):
        monkeypatch.setattr(sys, "argv", ["quickstart", *given])
        assert quickstart.main() == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_leaves_a_run_that_explains_itself(checkout: Path) -> None:
    kept = {path.name for path in (checkout / "runs/crystal-tiny").iterdir()}
    assert {
        "recipe.yaml",
        "plan.json",
        "environment.json",
        "metrics.jsonl",
        "log.txt",
        "report.html",
        "samples.txt",
    } <= kept


@pytest.mark.slow
def test_quickstart_again_says_that_it_goes_on(checkout: Path) -> None:
    assert "nothing to do" in run(checkout, sys.executable, "-m", "megacode.quickstart", *SHORT)


@pytest.mark.slow
def test_the_readme_commands_run(checkout: Path) -> None:
    commands = readme_commands()
    assert {c.split()[1] for c in commands} >= {
        "plan",
        "preprocess",
        "train",
        "evaluate",
        "generate",
        "report",
        "doctor",
    }
    my = checkout / "my"
    my.mkdir()
    import zstandard

    text = "".join(f'{{"text": "Document {i}: a few words, and then some more of them."}}\n' for i in range(200))
    (my / "one.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    shutil.copy(checkout / "data/quickstart/tokenizer.model", checkout / "my.model")
    (checkout / "my-recipe.yaml").write_text("extends: recipes/crystal-tiny.yaml\nname: mine\n")
    for command in commands:
        words = shlex.split(command)
        words = [w for word in words for w in (map(str, sorted(checkout.glob(word))) if "*" in word else [word])]
        words = ["3" if word == "110" else word for word in words]  # where the first phase ends
        extra = SHORT if words[1] == "train" else []
        assert re.match(r"\w", words[1])
        run(checkout, sys.executable, "-m", "megacode.cli", *words[1:], *extra)
