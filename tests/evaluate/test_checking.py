"""Which written texts pass: by comparison, by running them; and pass@k against all draws of k samples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megacode.evaluate.checking import check_answers, edit_similarity, pass_at_k
from megacode.evaluate.tasks import GenerationItem, Task


def task(**generation: Any) -> Task:
    return Task.model_validate({"name": "t", "data": "t.jsonl", "generation": generation})


def item(prompt: str = "", answer: str = "", tests: str = "") -> GenerationItem:
    return GenerationItem(prompt, answer, tests, None, "", "")


@pytest.mark.parametrize(
    ("generation", "text", "answer", "passes"),
    [
        ({}, " 12\n", "12", True),
        ({}, "12.", "12", False),
        ({}, "1 2", "12", False),
        ({"stop": ["\n", "x"]}, " 12\nmore", "12", True),
        ({"stop": ["\n", ";"]}, "12;\n", "12", True),
        ({}, "12\nmore", "12", False),
        ({"answer_after": "####"}, "3 + 9 = 12 #### 9 #### 12", "so #### 12", True),
        ({"answer_after": "####"}, "3 + 9 #### 12", "12", True),
        ({"answer_after": "####"}, "12", "12", False),
    ],
)
def test_exact(generation: dict[str, Any], text: str, answer: str, passes: bool) -> None:
    assert check_answers(task(**generation), [item(answer=answer)], [[text]]) == [[passes]]


def test_run_takes_every_sample_of_every_item() -> None:
    how = task(
        check="run", stop=["\n\n"], samples=4, temperature=1.0, k=[1], seconds=20.0, memory_mb=256
    )
    double = item(
        "def double(x):\n    return", tests="assert double(3) == 6\nassert double(0) == 0"
    )
    big = item("x =", tests="assert len(x) > 2")
    written = [
        [" 2 * x", " x + 3", " x + x\n\nraise ValueError", "\nimport os\nos._exit(0)"],
        [" [1, 2, 3]", " bytes(300 << 20)", " exit(0)", " '''"],
    ]
    assert check_answers(how, [double, big], written) == [
        [True, False, True, False],
        [True, False, False, False],
    ]


def test_pass_at_k_is_the_share_of_all_draws() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            passes = [i < c for i in range(n)]
            for k in range(1, n + 1):
                draws = list(itertools.combinations(passes, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)


def test_edit_similarity_is_the_ratio_of_common_characters() -> None:
    assert edit_similarity("this is a test", " this is a test!\n") == pytest.approx(28 / 29)
    assert edit_similarity("abcd", "dcba") == pytest.approx(2 / 8)
    assert (edit_similarity("", " "), edit_similarity("a", ""), edit_similarity("x y", "x y")) == (
        1,
        0,
        1,
    )
