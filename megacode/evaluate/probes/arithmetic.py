"""Arithmetic: sums and differences of numbers with one to three digits."""

from __future__ import annotations

import random

from megacode.evaluate.probes.probe import Item, Probe, ProbeTask, Record, block, is_held_out

_RANGES = {"1 digit": (0, 9), "2 digits": (10, 99), "3 digits": (100, 999)}
_TRAIN, _DEV = 6000, 300
_TRIES = 20
"""Draws per item, after which there is no other to be found."""
Question = tuple[str, int]
"""`12 + 7 =` and its result."""


def make(random_: random.Random, items: int) -> Probe:
    """`arithmetic`: the result is written. `arithmetic-ranked`: one of four results that are near
    each other. Two numbers are together in tests or in training, never in both."""
    each = -(-items // len(_RANGES))
    written = [
        {"prompt": prompt, "answer": str(result), "group": group}
        for group in _RANGES
        for prompt, result in _questions(random_, group, True, each)
    ]
    ranked: list[Item] = []
    for group in _RANGES:
        blocks = _blocks(_questions(random_, group, True, 10 * each), random_)[: -(-each // 4)]
        for prompts, choices in blocks:
            ranked += block(prompts, choices, len(ranked) // 4, [group] * 4)
    train: list[Record] = []
    for group in _RANGES:
        questions = _questions(random_, group, False, (_TRAIN + _DEV) // len(_RANGES))
        train += [(prompt, f" {result}") for prompt, result in questions]
    random_.shuffle(train)
    dev = len(train) * _DEV // (_TRAIN + _DEV)
    how = {"check": "exact", "max_tokens": 12, "stop": ["\n"]}
    about = "Sums and differences of two numbers"
    tasks = [
        ProbeTask("arithmetic", f"{about}.", written, None, how),
        ProbeTask(
            "arithmetic-ranked", f"{about}: which of four results.", ranked, {"score": "label"},
            baselines={"chance": 1 / 4},
        ),
    ]  # fmt: skip
    return Probe(tasks, train[dev:], train[:dev])


def _questions(random_: random.Random, group: str, held_out: bool, count: int) -> list[Question]:
    """Up to `count` different ones."""
    least, most = _RANGES[group]
    found: dict[Question, None] = {}
    for _ in range(count * _TRIES):
        a, b = random_.randint(least, most), random_.randint(least, most)
        if is_held_out(f"{min(a, b)} {max(a, b)}") != held_out:
            continue
        if random_.random() < 0.5:
            found[f"{a} + {b} =", a + b] = None
        else:
            found[f"{max(a, b)} - {min(a, b)} =", abs(a - b)] = None
        if len(found) == count:
            break
    return list(found)


def _blocks(questions: list[Question], random_: random.Random) -> list[tuple[list[str], list[str]]]:
    """Fours of questions with one sign whose results are neighbours; no question twice."""
    found = []
    for sign in "+-":
        by_result: dict[int, list[str]] = {}
        for prompt, result in questions:
            if sign in prompt:
                by_result.setdefault(result, []).append(prompt)
        while len(by_result) >= 4:
            results = sorted(by_result)
            start = random_.randrange(len(results) - 3)
            near = random_.sample(results[start : start + 4], 4)
            found.append(([by_result[one].pop() for one in near], [f" {one}" for one in near]))
            by_result = {result: left for result, left in by_result.items() if left}
    random_.shuffle(found)
    return found
