"""Datasets of the tiny study recipes, from what installed packages carry.

    chat        functions of the standard library: what one does, and its code
    code-stage  worded reasoning problems, and programming tasks with their code (reasoning-gym)
    code-share  documents of the quickstart's corpora as bytes, and tasks from probes
    math-cpt    sums, equations and worded problems with their solutions (reasoning-gym), and the
                prose of sympy's docstrings
    ntp-plus    pairs of functions and of programs (reasoning-gym), and tasks: see `pair_study`

`tools/study-data STUDY` runs this (`python -m megacode.quickstart.studies`). The same seed and the
same versions of Python and packages give the same records.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.resources
import importlib.util
import inspect
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from megacode.corpus.preprocess import Request
from megacode.corpus.workers import available_cores
from megacode.errors import UserError
from megacode.evaluate.probes import make_probe
from megacode.files import write_text
from megacode.quickstart.__main__ import DATA
from megacode.quickstart.corpora import gather, prepare, python_sources, read_source
from megacode.quickstart.docstrings import docstring_prose
from megacode.quickstart.pair_study import make_pair_study
from megacode.quickstart.solutions import solved_problems
from megacode.recipe import schema
from megacode.report.preprocessing import preprocess_visibly
from megacode.terminal import print_table, table_of
from megacode.tokenizer.training import write_byte_tokenizer

Record = dict[str, Any]

MOST_TOKENS = {"chat": 257, "code-stage": 321, "math-cpt": 321}
"""Of a conversation: a row of the recipes, and the label of its last token."""
WORDED = ("syllogism", "family_relationships", "calendar_arithmetic", "leg_counting",
          "letter_counting")  # fmt: skip
_APART = 1_000_000
"""Between the seeds of sets of records: item i of a generator's seed s is item i - 1 of s + 1."""


def make(study: str, folder: Path, console: Console, seed: int = 1) -> None:
    """Write `folder/STUDY/records/NAME.jsonl` and the datasets `folder/STUDY/NAME`, the study's
    tasks, and a table.

    Of records to train on, those whose question is held out or comes twice are left out. The
    tokenizer is the quickstart's, which is made first, with its corpora, where it is missing;
    for code-share it is bytes: probes ask for single brackets, and models of 0.4 M parameters
    learn them of bytes first.

    Raises:
        UserError: the study needs reasoning-gym, and it is not installed.
    """
    found = STUDIES[study](seed)
    tokenizer = prepare(DATA, console)["tokenizer"]
    section = schema.TokenizerSection(
        path=str(tokenizer), added_tokens="crystal", bos=True, eod=True
    )
    if study == "code-share":
        section = schema.TokenizerSection(path=str(folder / study / "bytes.json"), eod=True)
        write_byte_tokenizer(Path(section.path))
    table = table_of("", "dataset or task", "records", "repeated, left out", left=1)
    held_out = {_question(one) for name in found if _is_held_out(name) for one in found[name]}
    for name, given in found.items():
        of_pairs = study == "ntp-plus"
        records = given if _is_held_out(name) or of_pairs else _new(given, held_out)
        lines = folder / study / "records" / f"{name}.jsonl"
        lines.parent.mkdir(parents=True, exist_ok=True)
        write_text(lines, "".join(json.dumps(record) + "\n" for record in records))
        if of_pairs:
            continue
        is_text = "text" in records[0]
        request = Request(
            inputs=(str(lines),),
            tokenizer=section,
            output=folder / study / name,
            text_field="text" if is_text else "",
            conversations=not is_text,
            template=None if is_text else "crystal" if study == "chat" else "plain",
            max_tokens=None if is_text else MOST_TOKENS[study],
            too_long="drop",
            overwrite=True,
        )
        preprocess_visibly(request, available_cores(), console, title=name)
        repeated = len(given) - len(records)
        table.add_row(f"{folder / study / name}", f"{len(records):,}", f"{repeated:,}")
    if study == "ntp-plus":
        programs, solutions = (folder / study / f"records/{name}.jsonl" for name in found)
        code = DATA / "gathered/code.jsonl"
        for path in make_pair_study(folder / study, programs, solutions, section, code, console):
            table.add_row(str(path), "", "")
    for probe in PROBES.get(study, ()):
        for one in make_probe(probe, seed, folder / study / "tasks"):
            table.add_row(str(one.path), f"{sum(one.groups.values()):,}", "")
    print_table(console, table)


def chat(seed: int) -> dict[str, list[Record]]:
    """Two questions about each documented function of the standard library."""
    records = [
        {
            "messages": [
                {"role": "user", "content": f"What does {name} of {module} do?"},
                {"role": "assistant", "content": summary},
                {"role": "user", "content": "Show its code."},
                {"role": "assistant", "content": code},
            ]
        }
        for module, name, summary, code in _functions()
    ]
    return _split("", _shuffled(records, seed), 50)


def code_share(seed: int) -> dict[str, list[Record]]:
    """Text and code of the quickstart, 3 MB of each."""
    found: dict[str, list[Record]] = {}
    for name, path in gather(DATA / "gathered", Console(quiet=True)).items():
        lines = path.read_bytes().splitlines()
        records = _shuffled([{"text": json.loads(line)["text"]} for line in lines], seed)
        sizes = itertools.accumulate(len(one["text"].encode()) for one in records)
        within = [one for one, size in zip(records, sizes, strict=True) if size <= 3_000_000]
        found |= _split(f"{name}/", within, 20)
    return found


def code_stage(seed: int) -> dict[str, list[Record]]:
    """Worded problems and programming tasks."""
    create, first = _reasoning_gym(), 10 * _APART * seed
    tasks = [
        _exchange(row["task_description"], _plain_code(row["code_sample"])) for row in _programs()
    ]
    return {
        "text/train": _interleaved(generated(create, name, first, 400) for name in WORDED),
        "text/valid": _interleaved(generated(create, name, first + _APART, 40) for name in WORDED),
        **_split("code/", _shuffled(tasks, seed), 10),
    }


def math_cpt(seed: int) -> dict[str, list[Record]]:
    """Problems of three kinds, with a held-out set of each and one of worded problems whose
    templates are not trained on; prose of mathematics."""
    create, first = _reasoning_gym(), 10 * _APART * seed

    def worded(seed: int, count: int, new: bool) -> list[Record]:
        return generated(create, "gsm_symbolic", seed, count, lambda t: (t % 5 == 0) == new)

    sums = generated(create, "chain_sum", first, 600)
    equations = generated(create, "simple_equations", first, 600)
    stories = worded(first, 1200, new=False)
    texts = [{"text": text} for text in _sympy_prose()]
    return {
        "problems/train": _interleaved([stories[:600], sums, stories[600:], equations]),
        "sums/valid": generated(create, "chain_sum", first + _APART, 150),
        "equations/valid": generated(create, "simple_equations", first + _APART, 150),
        "worded/valid": worded(first + _APART, 150, new=False),
        "worded-new/valid": worded(first + 2 * _APART, 150, new=True),
        **_split("prose/", _shuffled(texts, seed), 50),
    }


def ntp_plus(seed: int) -> dict[str, list[Record]]:
    """Programs, each with a maker of inputs; two solutions of each of some problems."""
    kept = _shuffled(_programs(), seed)[:400]
    names = {"text": "code_sample", "generator": "input_generator"}
    return {
        "programs": [
            {"problem": str(i), **{ours: row[theirs] for ours, theirs in names.items()}}
            for i, row in enumerate(kept)
        ],
        "solutions": list(solved_problems(seed, 100)),
    }


STUDIES: dict[str, Callable[[int], dict[str, list[Record]]]] = {
    "chat": chat, "code-share": code_share, "code-stage": code_stage, "math-cpt": math_cpt,
    "ntp-plus": ntp_plus,
}  # fmt: skip
PROBES = {"code-share": ("brackets", "quotes", "copying", "agreement")}


# --------------------------------------------------------------------------------------- records


def generated(
    create: Callable[..., Any],
    name: str,
    seed: int,
    count: int,
    template: Callable[[int], bool] | None = None,
) -> list[Record]:
    """The first `count` problems of a reasoning-gym generator, with the solution's steps where it
    gives them; of `template`s that are wanted."""
    problems = create(name, seed=seed, size=count * 10 if template else count)
    numbers: Iterable[int] = range(len(problems))
    if template:
        numbers = [i for i in numbers if template(problems.task_indices[i])]
    some = [problems[i] for i in itertools.islice(numbers, count)]
    return [
        _exchange(one["question"], one["metadata"].get("answer_cot", one["answer"])) for one in some
    ]


def _reasoning_gym() -> Callable[..., Any]:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "code-stage, math-cpt and ntp-plus take records from the package reasoning-gym, which "
            "is not installed; pip install 'megacode[studies]'"
        )
    import reasoning_gym

    create: Callable[..., Any] = reasoning_gym.create_dataset
    return create


def _programs() -> list[Record]:
    """reasoning-gym's tasks of programming: description, code, maker of inputs."""
    _reasoning_gym()
    packed = importlib.resources.files("reasoning_gym").joinpath("data/codeio.jsonl.gz")
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines]


def _exchange(question: str, answer: str) -> Record:
    return {"input": question.strip() + "\n", "target": answer.strip()}


def _interleaved(kinds: Iterable[list[Record]]) -> list[Record]:
    """One of each kind in turn, so that a file that is read in its order is mixed."""
    return [record for some in zip(*kinds, strict=True) for record in some]


def _shuffled(records: list[Record], seed: int) -> list[Record]:
    return random.Random(seed).sample(records, len(records))


def _split(prefix: str, records: list[Record], every: int) -> dict[str, list[Record]]:
    """The `every`-th records are held out."""
    train = [record for i, record in enumerate(records) if i % every]
    return {f"{prefix}train": train, f"{prefix}valid": records[::every]}


def _is_held_out(name: str) -> bool:
    return name.endswith("valid")


def _question(record: Record) -> str:
    return str(record.get("input") or record.get("text") or record["messages"][0]["content"])


def _new(records: list[Record], asked: set[str]) -> list[Record]:
    """The first of the records of each question that is not among those `asked`."""
    first = {_question(record): record for record in reversed(records)}
    return [one for one in records if first[_question(one)] is one and _question(one) not in asked]


def _plain_code(source: str) -> str:
    """Source in one style, without comments."""
    return ast.unparse(ast.parse(source))


def _functions() -> Iterator[tuple[str, str, str, str]]:
    """(module, name, summary, code without docstring) of public functions that are documented."""
    _, root, paths = next(python_sources())
    for path in paths:
        source = read_source(path, 400, 120_000)
        if source is None:
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            summary, _, _ = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")
            summary = " ".join(summary.split())
            node.body = node.body[1:]
            if len(summary) >= 20 and summary.endswith(".") and node.body:
                yield module, node.name, summary, ast.unparse(node)


def _sympy_prose() -> Iterator[str]:
    root = importlib.resources.files("sympy")
    for path in sorted(Path(str(root)).rglob("*.py")):
        if "tests" not in path.parts and (found := docstring_prose(path.read_text("utf-8"))):
            yield "\n\n".join(found) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/study-data",
        description="Make the datasets of the tiny study recipes from installed packages.",
        epilog="Run it again: what is made already is kept.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("study", choices=list(STUDIES), help="whose data")
    add("--output", type=Path, default=Path("data/studies"), help=f"folder {default}")
    add("--seed", type=int, default=1, help=f"of the records {default}")
    args = parser.parse_args()
    try:
        make(args.study, args.output, Console(highlight=False), args.seed)
    except UserError as error:
        print(f"study-data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
