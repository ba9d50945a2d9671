"""From a synthesis file to rows: order, checks, targets, shards, kills, and what becomes of rows in training."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megacode.cli.main import main
from megacode.quickstart.teacher import make_server, reply_to, tutoring
from megacode.synthesize.make import candidates_of, open_synthesis
from megacode.tokenizer.training import train_tokenizer
from tests.processes import ROOT

PROBLEMS = 40


def problem(number: int) -> dict[str, str]:
    a, b = 3 * number + 1, 7 * number + 2
    target = f"{a} apples and {b} pears.\n{a} + {b} = {a + b}\n#### {a + b}"
    return {"id": f"p{number}", "input": f"Ann ({number}) has {a} apples and {b} pears. How many?", "target": target}  # fmt: skip


class Teacher:
    """The rules of `megacode.quickstart.teacher`, counted, each reply after `delay` seconds."""

    def __init__(self, delay: float = 0.0) -> None:
        problems = {problem(i)["input"]: problem(i)["target"] for i in range(PROBLEMS)}
        self.server, self.prompts = make_server(0, problems), []  # type: ignore[var-annotated]
        handler: Any = self.server.RequestHandlerClass

        class Counting(handler):  # type: ignore[misc]
            def do_POST(own) -> None:
                self.prompts.append(own.headers.get("Authorization", ""))
                time.sleep(delay)
                super().do_POST()

        self.server.RequestHandlerClass = Counting
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    made = Teacher()
    yield made
    made.server.shutdown()
    made.server.server_close()


def write(folder: Path, address: str, **changes: Any) -> Path:
    """A synthesis of tutorship over all problems, with changed keys."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(problem(i)) + "\n" for i in range(PROBLEMS))
    (folder / "problems.jsonl").write_text(lines)
    model = {"endpoints": [address], "in_flight": 8}
    file = {
        "name": "t", "inputs": ["problems.jsonl"], "fields": {"problem": "input", "solution": "target"},
        "operator": "tutorship", "output": "out", "checks": {"near_duplicates": False},
        "models": {"student": {"model": "weak", **model}, "teacher": {"model": "rules", **model}},
    }  # fmt: skip
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(file | changes))
    return path


def run(path: Path, *options: str, code: int = 0) -> None:
    assert main(["synthesize", str(path), *options]) == code


def rows(folder: Path, name: str = "out/rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_teacher_marks_the_first_wrong_line() -> None:
    right = problem(1)["target"]
    assert tutoring(right, right + "\nAnswer: 13").startswith("correct\n")
    wrong = tutoring(right, right.replace("4 + 9 = 13", "4 + 9 = 14"))
    assert wrong.startswith("wrong\n") and '"4 + 9 = 14"' in wrong and wrong.endswith("Answer: 13")
    assert "apples and" not in wrong
    assert tutoring("13", "14\nAnswer: 14").endswith("It should be:\n13\nAnswer: 13")
    assert reply_to("something else", {}) == ""


def test_rows_stand_in_the_order_of_the_inputs_with_their_origin(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(tmp_path, teacher.address))
    made = rows(tmp_path)
    assert [row["id"] for row in made] == [f"p{i}#0" for i in range(PROBLEMS)]
    for number, row in enumerate(made):
        assert row["answer"] == str(10 * number + 3)
        question, answer = (message["content"] for message in row["messages"])
        assert row["text"] == f"{question}\n\n{answer}" and question == problem(number)["input"]
        assert row["synthesis"] == {
            "operator": "tutorship", "parent": f"p{number}", "sample": 0,
            "models": {"student": "weak", "teacher": "rules"},
        }  # fmt: skip
    verdicts = {"attempt is wrong" in row["text"] for row in made}
    assert verdicts == {True, False}
    assert len(teacher.prompts) == 2 * PROBLEMS
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["accepted"] == PROBLEMS and len(manifest["journal"]) == 64
    said = capsys.readouterr().out
    assert f"{PROBLEMS} rows of {PROBLEMS} candidates (100.0%)" in said
    page = (tmp_path / "out/samples.html").read_text()
    assert "Ann (1) has" in page and "Nothing was rejected" in page

    run(tmp_path / "t.yaml")
    assert "kept" in capsys.readouterr().out and len(teacher.prompts) == 2 * PROBLEMS


def test_what_is_rejected_is_kept_with_its_reason(teacher: Teacher, tmp_path: Path) -> None:
    path = write(tmp_path, teacher.address)
    lines = [problem(i) | {"answer": "1"} for i in range(6)] + [{"id": "x", "target": "1"}]
    lines += [problem(7) | {"id": "like p7", "answer": "73"}, problem(7) | {"answer": "73"}]
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + "{no json\n"
    )
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"question": "Ann (8) has 25 apples and 58 pears. How many?"}))
    file = yaml.safe_load(path.read_text())
    checks = {"near_duplicates": {}, "held_out": {"files": ["test.jsonl"], "ngram": 5}}
    path.write_text(yaml.safe_dump(file | {"checks": checks}))
    with open(tmp_path / "problems.jsonl", "a") as more:
        more.write(json.dumps(problem(8)) + "\n")
    run(path)
    rejects = rows(tmp_path, "out/rejects.jsonl")
    reasons = {one["parent"]: one["reason"] for one in rejects}
    assert {reasons[f"p{i}"] for i in range(6)} <= {"judged correct, is wrong", "another answer"}
    assert reasons["p7"] == "near duplicate" and reasons["p8"] == "in a test set"
    assert next(one for one in rejects if one["parent"] == "p7")["detail"] == "of like p7#0"
    assert "test.jsonl record 1" in next(one for one in rejects if one["parent"] == "p8")["detail"]
    assert all(set(one["replies"]) == {"attempt", "tutoring"} for one in rejects)
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts["accepted"] == 1 and counts["candidates"] == 9
    assert (
        len(counts["records passed over"]) == 2 and counts["records passed over"]["no input"] == 1
    )


def test_it_stops_at_the_target_and_says_where_there_is_no_more(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, teacher.address)
    run(path, "--set", "target=7")
    assert [row["id"] for row in rows(tmp_path)] == [f"p{i}#0" for i in range(7)]
    path = write(tmp_path, teacher.address, target=500, samples=2)
    told = capsys.readouterr()
    run(path, code=2)
    assert "target, samples differ" in capsys.readouterr().err.replace(
        "samples, target", "target, samples"
    )
    asked = len(teacher.prompts)
    run(path, "--overwrite")
    assert len(rows(tmp_path)) == 2 * PROBLEMS
    assert asked == 14, "no candidate is asked about that the target does not take"
    assert len(teacher.prompts) == 4 * PROBLEMS, "what is known is not asked again"
    assert "500 rows were asked for; the inputs have no more candidates" in capsys.readouterr().out
    path = write(tmp_path, teacher.address, target=500, samples=2, candidates=9)
    run(path, "--overwrite")
    assert "`candidates` is reached" in capsys.readouterr().out and len(rows(tmp_path)) == 9
    assert told.err == ""


def test_shards_are_parts_of_the_whole(teacher: Teacher, tmp_path: Path) -> None:
    path = write(tmp_path, teacher.address, target=11)
    for number in range(3):
        run(path, "--shard", f"{number}/3")
    parts = [rows(tmp_path, f"out/rows-{number:05}-of-00003.jsonl") for number in range(3)]
    assert [len(part) for part in parts] == [3, 4, 4]
    assert [row["id"] for row in parts[1]] == [f"p{i}#0" for i in (1, 4, 7, 10)]


def test_an_estimate_sends_and_writes_nothing(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"endpoints": [teacher.address], "model": "m", "price": {"output": 1000.0}}
    limited = model | {"parameters": {"max_tokens": 100}, "requests_per_minute": 10}
    path = write(
        tmp_path, teacher.address, models={"student": model, "teacher": limited}, samples=3
    )
    run(path, "--dry-run")
    said = capsys.readouterr().out
    assert "120 candidates of 40 records" in said and "12,000" in said and "$12.00" in said
    assert "12.0 minutes" in said
    assert not teacher.prompts and not (tmp_path / "out").exists()


def test_keys_are_in_no_file(
    teacher: Teacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = {"endpoints": [teacher.address], "key": "THE_KEY"}
    path = write(tmp_path, teacher.address, models={"student": {"model": "weak", **model}, "teacher": {"model": "rules", **model}})  # fmt: skip
    run(path, code=2)
    assert "THE_KEY" in capfd.readouterr().err and not teacher.prompts
    monkeypatch.setenv("THE_KEY", "planted-93b1")
    run(path)
    assert set(teacher.prompts) == {"Bearer planted-93b1"}
    out, err = capfd.readouterr()
    assert "planted-93b1" not in out + err
    for file in (tmp_path / "out").iterdir():
        assert b"planted-93b1" not in file.read_bytes(), file


def test_rows_are_read_as_conversations_and_as_text_and_traced(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(tmp_path, teacher.address))
    texts = [row["text"] for row in rows(tmp_path)]
    train_tokenizer(texts, tmp_path / "t.model", vocab_size=330)
    common = ["--tokenizer", str(tmp_path / "t.model"), "--workers", "1"]
    chat = ["--conversations", "--template", "plain"]
    for name, options in (("chat", chat), ("text", [])):
        given = str(tmp_path / "out/rows.jsonl")
        out = str(tmp_path / name)
        assert main(["preprocess", given, "--output", out, *options, *common]) == 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    capsys.readouterr()
    assert main(["trace", str(recipe), "--step", "1", "--json"]) == 0
    parts = [d for one in json.loads(capsys.readouterr().out)["samples"] for d in one["documents"]]
    made = rows(tmp_path)
    assert len(parts) >= 8 and {"answers" in part for part in parts} == {True, False}
    for part in parts:
        assert part["synthesis"] == made[part["record"] - 1]["synthesis"]
    assert main(["trace", str(recipe), "--step", "1"]) == 0
    origin = parts[0]["synthesis"]
    told = f"tutorship of {origin['parent']}#0 by student weak, teacher rules"
    assert told in capsys.readouterr().out


RECIPE = """
name: r
tokenizer: {{path: {folder}/t.model, eod: true}}
model: {{layers: 1, hidden_size: 32, heads: 2, context_length: 1024}}
sources:
  text: {{path: {folder}/text}}
  chat: {{path: {folder}/chat, packing: best_fit, loss_on: answers}}
phases:
  - name: p
    steps: 1
    batch_size: 8
    sequence_length: 1024
    reset_at_eod: true
    mixture: {{sources: {{text: 1, chat: 1}}}}
    learning_rate: {{peak: 0.001}}
"""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"operator": "tutorshop"}, "tutorshop"),
        ({"models": {"teacher": {"model": "m", "endpoints": ["http://h/v1"]}}}, "asks a student; add it"),
        ({"inputs": ["nothing.jsonl"]}, "nothing.jsonl"),
        ({"outputs": "x"}, "outputs"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_sent(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, told: str
) -> None:
    run(write(tmp_path, teacher.address, **changes), code=2)
    assert told in capsys.readouterr().err
    assert not teacher.prompts and not (tmp_path / "out").exists()


def test_killed_at_random_moments_it_ends_with_the_same_rows(tmp_path: Path) -> None:
    slow = Teacher(delay=0.03)
    once = write(tmp_path / "once", slow.address)
    again = write(tmp_path / "again", slow.address)
    run(once)
    asked = len(slow.prompts)
    command = [sys.executable, "-m", "megacode.cli", "synthesize", str(again)]
    journal, choose, kills = tmp_path / "again/out/journal.sqlite", random.Random(3), 0
    for _ in range(5):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None and not journal.exists():
            time.sleep(0.005)
        time.sleep(0.6 + choose.random() * 0.4)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 2
    run(again)
    for name in ("rows.jsonl", "rejects.jsonl"):
        assert (tmp_path / "once/out" / name).read_bytes() == (tmp_path / "again/out" / name).read_bytes()  # fmt: skip
    digests = [json.loads((tmp_path / one / "out/manifest.json").read_text())["journal"] for one in ("once", "again")]  # fmt: skip
    assert digests[0] == digests[1]
    assert asked == 2 * PROBLEMS and len(slow.prompts) - asked <= 2 * PROBLEMS + kills * 16
    slow.server.shutdown()
    slow.server.server_close()


def test_killed_before_its_manifest_it_goes_on(teacher: Teacher, tmp_path: Path) -> None:
    path = write(tmp_path, teacher.address)
    run(path)
    whole = (tmp_path / "out/rows.jsonl").read_bytes()
    (tmp_path / "out/manifest.json").unlink()
    run(path)
    assert (tmp_path / "out/rows.jsonl").read_bytes() == whole
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/journal.sqlite").unlink()
    run(path, code=2)


def test_a_judge_accepts_and_refuses_rows(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(prompt: str, problems: dict[str, str]) -> str:
        if not prompt.startswith("Judge the example"):
            return reply_to(prompt, problems)
        return "refuse\nNo." if "Ann (3)" in prompt else "accept\nYes."

    monkeypatch.setattr("megacode.quickstart.teacher.reply_to", reply)
    model = {"endpoints": [teacher.address], "model": "m"}
    models = dict.fromkeys(("student", "teacher", "judge"), model)
    checks = {"near_duplicates": False, "judge": True}
    run(write(tmp_path, teacher.address, models=models, checks=checks))
    assert len(rows(tmp_path)) == PROBLEMS - 1
    (refused,) = rows(tmp_path, "out/rejects.jsonl")
    assert (refused["parent"], refused["reason"]) == ("p3", "judge refused")
    assert rows(tmp_path)[0]["synthesis"]["models"]["judge"] == "m"
    assert "judgement" in json.loads((tmp_path / "out/manifest.json").read_text())["prompts"]


def test_the_documented_file_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs/synthesis.md").read_text()
    (tmp_path / "s.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}))
    opened = open_synthesis(tmp_path / "s.yaml")
    assert opened.operator.roles == ("student", "teacher", "judge")
    assert opened.target == 10_000 and next(candidates_of(opened, opened.counts()))
