"""The executables of a checkout: what a user types after them reaches the Python verb as it stands, and nothing else does.

They run in a copy of tools/ whose `.venv` holds recorders instead of Python and pip, so nothing is installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if "install" in sys.argv:
    print("Looking in indexes ...")
    print("  BuildBackendWarning: Editable installation.", file=sys.stderr)
    sys.exit(os.environ.get("BROKEN", "no such package") in sys.argv)
sys.exit(int(os.environ.get("EXIT", 0)) if "-m" in sys.argv else 0)
"""
OPTIONS = ("--set", "name=two words", "--run", "a'b", "*.yaml", "", "--restart", "$HOME")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a checkout"
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copytree(ROOT / "tools", folder / "tools")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("python", "pip", "ruff", "mypy", "lint-imports"):
        (folder / ".venv/bin" / name).write_text(RECORDER)
        (folder / ".venv/bin" / name).chmod(0o755)
    return folder


def call(checkout: Path, tool: str, *arguments: str, code: int = 0) -> list[list[str]]:
    """Call a tool from another folder; every command of `.venv` that it called, in order."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        [checkout / "tools" / tool, *arguments], cwd="/", capture_output=True, text=True,
        env={**os.environ, "CALLS": str(calls), "EXIT": str(code)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in calls.read_text().splitlines()]


def installs(calls: list[list[str]]) -> list[str]:
    """What was installed as the checkout itself: `.` or `.[extras]`."""
    return [call[-1] for call in calls if call[0] == "pip" and "--editable" in call]


@pytest.mark.parametrize(
    ("tool", "verb", "extras"),
    [
        ("quickstart", ["python", "-m", "megacode.quickstart"], "."),
        ("test", ["python", "-m", "pytest"], ".[test]"),
        ("study-data", ["python", "-m", "megacode.quickstart.studies"], ".[studies]"),
    ],
)
def test_options_reach_the_verb_and_not_the_environment(
    checkout: Path, tool: str, verb: list[str], extras: str
) -> None:
    first = call(checkout, tool, *OPTIONS)
    assert first[-1] == [*verb, *OPTIONS]
    assert installs(first) == [extras]
    assert not any(set(OPTIONS) & set(command) for command in first[:-1])
    again = call(checkout, tool, *OPTIONS[::-1])
    assert again[-1] == [*verb, *OPTIONS[::-1]]
    assert not [command for command in again if command[0] == "pip"], (
        "it is installed once, whatever the options"
    )


def test_without_options_there_are_none(checkout: Path) -> None:
    calls = call(checkout, "quickstart")
    assert calls[-1] == ["python", "-m", "megacode.quickstart"] and installs(calls) == ["."]


def test_tests_come_after_the_linter_and_slurms_by_themselves(checkout: Path) -> None:
    tests = ["python", "-m", "pytest"]
    options = "-n 2 --dist loadscope --no-loadscope-reorder --durations 25 --ignore tests/slurm"
    parallel = [*tests, *options.split()]
    commands = "ruff check .", "ruff format --check --quiet .", "mypy", "lint-imports --no-logo"
    checks = [command.split() for command in commands]
    assert call(checkout, "test")[-6:] == [*checks, parallel, [*tests, "tests/slurm"]]
    some = call(checkout, "test", "-k", "mixture")
    assert some[-1] == [*tests, "-k", "mixture"] and ["ruff", "check", "."] not in some


def test_preprocess_installs_nothing(checkout: Path) -> None:
    assert call(checkout, "preprocess", *OPTIONS) == [
        ["python", "-m", "megacode.cli", "preprocess", *OPTIONS]
    ]


@pytest.mark.parametrize("tool", ["quickstart", "test", "preprocess", "study-data"])
def test_the_exit_code_is_the_verb_s(checkout: Path, tool: str) -> None:
    call(checkout, tool, code=3)


def test_another_set_of_pins_is_installed_again(checkout: Path) -> None:
    call(checkout, "test")
    with (checkout / "tools/constraints.txt").open("a") as pins:
        pins.write("# changed\n")
    assert installs(call(checkout, "test")) == [".[test]"]


def test_setting_up_says_little_and_keeps_the_rest(checkout: Path) -> None:
    environment = {**os.environ, "CALLS": str(checkout / "calls")}
    done = subprocess.run(
        [checkout / "tools/quickstart"], capture_output=True, text=True, env=environment
    )
    said = [line.strip() for line in done.stdout.splitlines()]
    assert said[:3] == ["Bringing .venv up to date:", "torch ...", "Megatron-Core and the rest ..."]
    assert said[3].startswith("Ready after") and len(said) == 4 and done.stderr == ""
    assert "BuildBackendWarning" in (checkout / ".venv/setup.log").read_text()


def test_an_environment_of_yours_is_used_as_it_is(checkout: Path, tmp_path: Path) -> None:
    """Python on PATH has this checkout installed: in a container, whose torch and Transformer Engine must stay."""
    yours = tmp_path / "yours"
    yours.mkdir()
    (yours / "python").write_text(f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "-c":
    if "find_spec" not in sys.argv[2]:
        sys.exit(int(os.environ["UNTESTED"]))
    sys.exit(not os.path.samefile(sys.argv[3], os.environ["INSTALLED"]))
print(json.dumps(["yours", *sys.argv[1:]]))
""")
    (yours / "python").chmod(0o755)

    def run(tool: str, installed: Path, untested: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ, "PATH": f"{yours}:{os.environ['PATH']}", "INSTALLED": str(installed), "UNTESTED": str(untested),
            "CALLS": str(checkout / "calls"),
        }  # fmt: skip
        return subprocess.run(
            [checkout / "tools" / tool, "a"], capture_output=True, text=True, env=environment
        )

    tested, started = run("test", checkout), run("quickstart", checkout, untested=1)
    assert json.loads(tested.stdout) == ["yours", "-m", "pytest", "a"]
    assert json.loads(started.stdout) == ["yours", "-m", "megacode.quickstart", "a"]
    assert not (checkout / "calls").exists(), "nothing of .venv is called"
    without = run("test", checkout, untested=1)
    assert without.returncode == 2 and "pip install -e '.[test]'" in without.stderr
    run("test", tmp_path)  # another checkout's: .venv as ever
    assert '["python", "-m", "pytest", "a"]' in (checkout / "calls").read_text()


def test_an_active_venv_of_the_checkout_is_brought_up_to_date(
    checkout: Path, tmp_path: Path
) -> None:
    """Also where it is reached by another name than the tools'."""
    (tmp_path / "link").symlink_to(checkout)
    for name in (checkout, tmp_path / "link"):
        (checkout / "calls").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{name}/.venv/bin:{os.environ['PATH']}",
            "CALLS": str(checkout / "calls"),
        }
        done = subprocess.run(
            [checkout / "tools/test", "a"], capture_output=True, text=True, env=environment
        )
        calls = [json.loads(line) for line in (checkout / "calls").read_text().splitlines()]
        assert installs(calls) == [".[test]"] and "Using" not in done.stderr
        with (checkout / "tools/constraints.txt").open("a") as pins:
            pins.write("# changed\n")


def test_a_failed_set_up_shows_why_and_starts_nothing(checkout: Path) -> None:
    calls = checkout / "calls"
    environment = {**os.environ, "CALLS": str(calls), "BROKEN": "--editable"}
    for _ in range(2):  # and is not taken for done the next time
        done = subprocess.run(
            [checkout / "tools/quickstart"], capture_output=True, text=True, env=environment
        )
        assert (
            done.returncode == 1
            and "Setting up .venv failed" in done.stderr
            and "BuildBackendWarning" in done.stderr
        )
    assert '"python"' not in calls.read_text()


def test_files_that_the_docs_name_are_there() -> None:
    """Paths of the checkout in README, CONTRIBUTING and docs/, and the targets of their links."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    folders = "megacode|tests|bench|tools|recipes|slurm|docs"
    for page in pages:
        text = page.read_text()
        named = re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|md|sh|txt))`", text)
        links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if ":" not in link]
        named = [name for name in named if not re.search("[A-Z]{3}", name)]  # placeholders
        missing = [name for name in named if not (ROOT / name).is_file()]
        missing += [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page.name} names {missing}"
