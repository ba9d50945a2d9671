"""Boxes: what one of three boxes holds after operations (entity tracking)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from megacode.evaluate.probes.probe import Probe, ProbeTask, Record

_NOUNS = {
    False: "apple book coin flower glass hammer key letter pen ring shoe stone".split(),
    True: "ball bell brick candle card cup hat lamp map plate shell watch".split(),
}
"""By whether they are for tests."""
_BOXES, _MOST = (1, 2, 3), 4
_TRAIN, _DEV = 4000, 400


@dataclass(frozen=True)
class _Scenario:
    text: str
    first: str
    last: str
    objects: int


def make(random_: random.Random, items: int) -> Probe:
    """`boxes` asks for a box that 1 to 4 operations touch; `boxes-untouched` for one that none
    does, where the answer is a copy of the prompt. The objects of a box are in the order in which
    they came."""
    how = {"check": "exact", "max_tokens": 32, "stop": ["\n", "."]}
    tasks = []
    for name, touched in (("boxes", (1, 2, 3, 4)), ("boxes-untouched", (0,))):
        tests: dict[str, tuple[_Scenario, int]] = {}
        while len(tests) < items:
            times = touched[len(tests) % len(touched)]
            scenario = _scenario(random_, _NOUNS[True], times)
            tests[scenario.text] = scenario, times
        found = [
            {"prompt": one.text, "answer": one.last, "group": f"operations {times}"}
            for one, times in tests.values()
        ]
        scenarios = [one for one, _ in tests.values()]
        baselines = {
            "always nothing": sum(one.last == "nothing" for one in scenarios) / len(found),
            "copy of the first state": sum(one.first == one.last for one in scenarios) / len(found),
            "random (every object in with 1/3)": sum(map(_by_chance, scenarios)) / len(found),
        }
        about = f"What a box holds that operations touched {' or '.join(map(str, touched))} times."
        tasks.append(ProbeTask(name, about, found, None, how, baselines))
    records: dict[Record, None] = {}
    while len(records) < _TRAIN + _DEV:
        scenario = _scenario(random_, _NOUNS[False], len(records) % (_MOST + 1))
        records[scenario.text, f" {scenario.last}."] = None
    train = list(records)
    return Probe(tasks, train[:_TRAIN], train[_TRAIN:])


def _scenario(random_: random.Random, nouns: list[str], times: int) -> _Scenario:
    """Boxes, 1 to 4 operations, and a question for a box that `times` of them touch."""
    while True:
        free = random_.sample(nouns, len(nouns))
        boxes = {box: [free.pop() for _ in range(random_.randrange(3))] for box in _BOXES}
        first = {box: _said(objects) for box, objects in boxes.items()}
        objects = sum(map(len, boxes.values()))
        sentences = [f"Box {box} has {first[box]}." for box in _BOXES]
        touched = dict.fromkeys(_BOXES, 0)
        for _ in range(random_.randint(max(times, 1), _MOST)):
            kind = random_.choice(("move", "remove", "put"))
            full = [box for box in _BOXES if boxes[box]]
            if kind == "put" or not full:
                box = random_.choice(_BOXES)
                boxes[box].append(free.pop())
                objects += 1
                sentences.append(f"Put the {boxes[box][-1]} into Box {box}.")
            else:
                box = random_.choice(full)
                moved = boxes[box].pop(random_.randrange(len(boxes[box])))
                if kind == "move":
                    target = random_.choice([other for other in _BOXES if other != box])
                    boxes[target].append(moved)
                    touched[target] += 1
                    sentences.append(f"Move the {moved} from Box {box} to Box {target}.")
                else:
                    sentences.append(f"Remove the {moved} from Box {box}.")
            touched[box] += 1
        if asked := [box for box in _BOXES if touched[box] == times]:
            box = random_.choice(asked)
            text = f"{' '.join(sentences)} Box {box} has"
            return _Scenario(text, first[box], _said(boxes[box]), objects)


def _said(objects: list[str]) -> str:
    return " and ".join(f"the {one}" for one in objects) or "nothing"


def _by_chance(scenario: _Scenario) -> float:
    """The chance of a guess that has each object of the scenario with 1/3, in the right order."""
    held = scenario.last.count("the ")
    return float((1 / 3) ** held * (2 / 3) ** (scenario.objects - held))
