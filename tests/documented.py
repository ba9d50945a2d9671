"""The commands of README.md, docs/ and every `--help`, as they stand there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
_PROGRAM = re.compile(
    r"(megacode|tools/[\w-]+|(python3? )?bench/[\w.]+|slurm/[\w.-]+|sbatch|srun|torchrun|pip|jq)\s"
)


@dataclass(frozen=True)
class Command:
    """`line` is what bash gets, in one line; `where` is its page and line number, or the verb whose help shows it."""

    where: str
    line: str


def of_page(page: str) -> list[Command]:
    """Every line of the fences marked `bash`, and indented lines that call one of the project's programs."""
    found, language = [], None
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            language = None if language is not None else line[3:].strip()
        elif language == "bash" or (
            language is None and line.startswith("    ") and _PROGRAM.match(line.strip() + " ")
        ):
            found.append((number, line))
    return [Command(f"{page}:{number}", text) for number, text in _joined(lines, found)]


def of_help(verb: str, text: str) -> list[Command]:
    """Lines of a help's examples that call one of the project's programs."""
    examples = re.split(r"^examples?:", text, maxsplit=1, flags=re.MULTILINE)[-1].splitlines()
    found = [
        (number, line)
        for number, line in enumerate(examples, 1)
        if _PROGRAM.match(line.strip() + " ")
    ]
    return [Command(f"megacode {verb} --help", text) for _, text in _joined(examples, found)]


def _joined(lines: list[str], found: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Commands with the lines that a `\\` at the end continues; without lines that are comments alone."""
    out: list[tuple[int, str]] = []
    past = 0
    for number, first in found:
        if number <= past or not first.strip() or first.strip().startswith("#"):
            continue
        text, past = first.strip(), number
        while text.endswith("\\"):
            text = f"{text[:-1].rstrip()} {lines[past].strip()}"
            past += 1
        out.append((number, text))
    return out


def in_prose(page: str) -> list[Command]:
    """Commands with options within a line, as `megacode plan RECIPE --gpus N`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(
        r"^```.*?^```",
        lambda match: "\n" * match[0].count("\n"),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    return [
        Command(f"{page}:{number}", one)
        for number, line in enumerate(prose.splitlines(), 1)
        for one in re.findall(r"`([^`]+)`", line)
        if _PROGRAM.match(f"{one} ") and " " in one
    ]
