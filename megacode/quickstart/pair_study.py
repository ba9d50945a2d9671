"""Data of the study ntp-plus: pairs of functions and of programs, datasets of them, and tasks.

Functions are those of the quickstart's code. Programs are reasoning-gym's, which come with makers
of inputs, so that what is equivalent has been run. `operator-flipped` and other solutions of a
problem (`solutions`) are never trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from megacode.corpus.pairs.records import PairRecord, read_pairs
from megacode.corpus.pairs.request import PairRequest
from megacode.corpus.preprocess.request import PairForm, Request
from megacode.corpus.workers import available_cores
from megacode.files import write_text
from megacode.recipe import schema
from megacode.report.pairs import make_pairs_visibly
from megacode.report.preprocessing import preprocess_visibly

HELD_OUT = "operator-flipped"
MOST_TOKENS = 512
"""Of a pair: a row of the recipes."""
_ASKED = 150
"""Records of each kind of corpus that LECS asks about."""
_TRAINED = "other: [lines-shuffled, tokens-shuffled, other-problem]"
_LECS = {
    "lecs-mean": f"{{score: embedding, {_TRAINED}}}",
    "lecs-last": f"{{score: embedding, pooling: last, {_TRAINED}}}",
    "lecs-likelihood": f"{{score: likelihood, {_TRAINED}}}",
    "lecs-prompt": f"{{score: prompt, {_TRAINED}}}",
    "lecs-held-out": f"{{score: embedding, other: [{HELD_OUT}]}}",
}
_GRID = {"lecs-grid": "{score: embedding}", "lecs-grid-likelihood": "{score: likelihood}"}
"""Renamed and other solutions against shuffled lines and other problems: of solved problems."""
_COMPLETION = "{check: exact, max_tokens: 48, stop: ['\\n']}"


def make_pair_study(
    folder: Path,
    programs: Path,
    solutions: Path,
    tokenizer: schema.TokenizerSection,
    code: Path,
    console: Console,
) -> list[Path]:
    """Write `folder/{functions,programs,solved}.jsonl`, the datasets
    `folder/{members,sequences}/train` and `folder/tasks`.

    Args:
        programs: JSONL of `text`, `problem` and `generator`.
        solutions: the same, with several of a problem.
        code: JSONL of files, with `text` and `path`.

    Returns:
        The files of tasks.
    """
    asked = {
        "functions": PairRequest(
            inputs=(str(code),), output=folder / "functions.jsonl", max_lines=30
        ),
        "programs": PairRequest(
            inputs=(str(programs),),
            output=folder / "programs.jsonl",
            language="python",
            problem_field="problem",
            generator_field="generator",
        ),
    }
    held_out: list[PairRecord] = []
    for request in asked.values():
        made = vars(request) | {"validation": 0.15, "hold_out": (HELD_OUT,), "overwrite": True}
        complete = PairRequest(**made)
        make_pairs_visibly(complete, available_cores(), console)
        found = list(read_pairs(complete.outputs["validation"]))
        held_out += random.Random(0).sample(found, min(_ASKED, len(found)))
    forms: tuple[PairForm, ...] = ("members", "sequences")
    for form in forms:
        tokens = Request(
            inputs=tuple(str(request.output) for request in asked.values()),
            tokenizer=tokenizer,
            output=folder / form / "train",
            text_field="",
            pairs=form,
            max_tokens=MOST_TOKENS,
            too_long="drop",
            shuffle=0,
            overwrite=True,
        )
        preprocess_visibly(tokens, available_cores(), console, title=f"pairs as {form}")
    solved = PairRequest(
        inputs=(str(solutions),),
        output=folder / "solved.jsonl",
        kinds=("renamed", "solution", "lines-shuffled", "other-problem"),
        language="python",
        problem_field="problem",
        generator_field="generator",
        overwrite=True,
    )
    make_pairs_visibly(solved, available_cores(), console)
    return _write_tasks(folder / "tasks", held_out, list(read_pairs(solved.output)))


def _write_tasks(
    folder: Path, records: Sequence[PairRecord], solved: Sequence[PairRecord]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for data, asked, how in (("pairs", records, _LECS), ("solved", solved, _GRID)):
        write_text(folder / f"{data}.jsonl", "".join(one.line().decode() for one in asked))
        for name, lecs in how.items():
            files.append(folder / f"{name}.yaml")
            write_text(files[-1], f"name: {name}\ndata: {data}.jsonl\nlecs: {lecs}\n")
    for name, fill in (("completion", False), ("completion-fim", True)):
        items = [one for record in records for one in _completions(record, fill)]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(one) + "\n" for one in items))
        about = f"name: {name}\ndata: {name}.jsonl\ngeneration: {_COMPLETION}\n"
        write_text(folder / f"{name}.yaml", about)
        files.append(folder / f"{name}.yaml")
    return files


def _completions(record: PairRecord, fill: bool) -> Iterator[dict[str, str]]:
    """A line of a function's body, left out; none of functions that have no line to choose."""
    lines = record.query.split("\n")
    chosen = [i for i, line in enumerate(lines[2:], 2) if len(line.strip()) >= 8]
    if not chosen:
        return
    at = random.Random(record.id).choice(chosen)
    line = lines[at]
    blank = len(line) - len(line.lstrip())
    prompt = "".join(f"{one}\n" for one in lines[:at]) + line[:blank]
    item = {"prompt": prompt, "answer": line[blank:], "cluster": record.group}
    yield item | ({"suffix": "\n" + "\n".join(lines[at + 1 :])} if fill else {})
