"""Data of the tiny studies: the same records for the same seed, nothing held out is trained on, answers are right."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from megacode.quickstart import studies
from megacode.quickstart.solutions import solved_problems
from megacode.quickstart.studies import STUDIES

NEEDS_GYM = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
ALL = ["chat", *(pytest.param(name, marks=NEEDS_GYM) for name in ("code-stage", "math-cpt"))]


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, str, str, str]]:
    return list(studies._functions())


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch, functions: list[tuple[str, str, str, str]]) -> None:
    """Parsing a library takes seconds."""
    monkeypatch.setattr(studies, "_functions", lambda: functions)
    prose = [f"Page {number}.\n" for number in range(99)]
    monkeypatch.setattr(studies, "_sympy_prose", lambda: prose)


@pytest.mark.parametrize("study", ALL)
def test_a_seed_gives_its_records_again_and_another_seed_others(study: str) -> None:
    first, again, other = STUDIES[study](1), STUDIES[study](1), STUDIES[study](2)
    assert first == again and first.keys() == other.keys()
    for name, records in first.items():
        assert records != other[name]
        if name in ("problems/train", "text/train"):  # drawn, not chosen from a fixed set
            both = {record["input"] for record in records} & {one["input"] for one in other[name]}
            assert len(both) < 0.05 * len(records)


def test_questions_that_are_held_out_or_come_twice_are_left_out() -> None:
    records = [{"input": question, "target": str(i)} for i, question in enumerate("abcab")]
    assert studies._new(records, {"c"}) == records[:2]


@NEEDS_GYM
def test_templates_that_are_held_out_are_not_trained_on() -> None:
    import reasoning_gym

    made, templates = STUDIES["math-cpt"](1), {}
    for seed in (10_000_000, 11_000_000, 12_000_000):  # seed 1: to train on, held out, new
        drawn = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=3000)
        questions = (drawn[i]["question"].strip() + "\n" for i in range(len(drawn)))
        templates |= dict(zip(questions, drawn.task_indices, strict=True))
    found = {
        name: {templates[one["input"]] for one in made[name] if one["input"] in templates}
        for name in ("problems/train", "worded/valid", "worded-new/valid")
    }
    assert len(found["worded-new/valid"]) > 10 and found["worded/valid"] <= found["problems/train"]
    assert not found["worded-new/valid"] & found["problems/train"]


@NEEDS_GYM
def test_sums_are_right_and_code_is_code() -> None:
    made = STUDIES["math-cpt"](1)
    for record in made["sums/valid"][:50]:
        expression = record["input"].strip().rpartition(": ")[2].removesuffix("=")
        assert eval(expression) == int(record["target"])
    tasks = STUDIES["code-stage"](1)["code/valid"]
    assert len(tasks) > 250 and all(ast.parse(record["target"]) for record in tasks)


def test_conversations_ask_for_summary_and_code() -> None:
    made = STUDIES["chat"](1)
    assert len(made["train"]) > 40 * len(made["valid"]) > 2000
    for record in made["valid"]:
        _, summary, _, code = (message["content"] for message in record["messages"])
        (function,) = ast.parse(code).body
        assert summary.endswith(".") and isinstance(function, ast.FunctionDef)
        assert f"What does {function.name} of " in record["messages"][0]["content"]


def test_a_missing_package_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "reasoning_gym" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study-data", "math-cpt"])
    assert studies.main() == 2
    assert "pip install 'megacode[studies]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_documents_of_the_shares_are_as_many_bytes_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("code", "text")}
    monkeypatch.setattr(studies, "gather", lambda folder, console: files)
    for name in ("code", "text"):
        lines = [{"text": f"{name} {i} " + "é" * 5_000} for i in range(400)]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = STUDIES["code-share"](1)
    assert found == STUDIES["code-share"](1) != STUDIES["code-share"](2)
    for name in ("code", "text"):
        train, valid = ([one["text"] for one in found[f"{name}/{k}"]] for k in ("train", "valid"))
        sizes = [len(text.encode()) for text in train + valid]
        assert 3_000_000 - max(sizes) < sum(sizes) <= 3_000_000
        assert not set(train) & set(valid) and len(valid) * 19 == pytest.approx(len(train), abs=19)


def test_two_solutions_of_a_problem_compute_the_same() -> None:
    made = list(solved_problems(1, 100))
    assert made == list(solved_problems(1, 100)) != list(solved_problems(2, 100))
    rng, differ = random.Random(0), 0
    inputs = [[rng.randint(-30, 30) for _ in range(rng.randint(0, 12))] for _ in range(20)]

    def results(record: dict[str, Any]) -> list[int]:
        names: dict[str, Any] = {}
        exec(record["text"], names)
        return [[*names.values()][-1](values) for values in inputs]

    for one, other in zip(made[::2], made[1::2], strict=True):
        assert one["problem"] == other["problem"] and one["text"] != other["text"]
        assert results(one) == results(other)
        differ += results(one) != results(made[0])
    assert differ > 90
