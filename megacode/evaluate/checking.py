"""What a model wrote for the items of a `generation` task: which texts pass, and pass@k of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megacode.corpus.workers import available_cores
from megacode.evaluate.tasks import Generation, GenerationItem, Task
from megacode.sandbox import run_programs


def check_answers(
    task: Task,
    items: Sequence[GenerationItem],
    texts: Sequence[Sequence[str]],
    workers: int | None = None,
) -> list[list[bool]]:
    """Whether each text passes, by item and sample.

    Args:
        task: a `generation` task.
        texts: what the model wrote after each item's prompt, `task.generation.samples` each; what
            follows a `stop` is left out here.
        workers: programs that run at a time (`check: run`); all cores if None.

    Raises:
        UserError: `check: run`, and this machine has no sandbox.
    """
    how = task.generation
    assert how
    answers = [
        (item, _before(how.stop, text))
        for item, samples in zip(items, texts, strict=True)
        for text in samples
    ]
    if how.check == "exact":
        passed = iter([_is_equal(how, text, item.answer) for item, text in answers])
    else:
        outcomes = run_programs(
            [f"{item.prompt}{text}\n{item.tests}" for item, text in answers],
            workers or available_cores(),
            seconds=how.seconds,
            memory_mb=how.memory_mb,
        )
        passed = iter([outcome.ok for outcome in outcomes])
    return [[next(passed) for _ in samples] for samples in texts]


def edit_similarity(text: str, answer: str) -> float:
    """0 to 1: 2 x the longest common subsequence / the lengths of both, without blanks around (the
    `fuzz.ratio` of CodeXGLUE's completion task, arXiv 2102.04664)."""
    a, b = text.strip(), answer.strip()
    if not a and not b:
        return 1.0
    row = [0] * (len(b) + 1)
    for one in a:
        before = 0  # of the row above, one to the left
        for place, other in enumerate(b, 1):
            above = row[place]
            row[place] = before + 1 if one == other else max(above, row[place - 1])
            before = above
    return 2 * row[-1] / (len(a) + len(b))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of `k` samples passes, if `passed` of `samples` do: the unbiased
    estimator of arXiv 2107.03374, 1 - C(samples - passed, k) / C(samples, k)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def _before(stops: Sequence[str], text: str) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _is_equal(how: Generation, text: str, answer: str) -> bool:
    """Equal without blanks around; with `answer_after`, a text without the mark is no answer."""
    if how.answer_after:
        _, mark, text = text.rpartition(how.answer_after)
        answer = answer.rpartition(how.answer_after)[2]
        if not mark:
            return False
    return text.strip() == answer.strip()
