"""Passivization: an active sentence to its passive, after training on both."""

from __future__ import annotations

import random

from megacode.evaluate.probes.probe import Probe, ProbeTask, Record
from megacode.evaluate.probes.words import ANIMATE, OBJECTS, PLACES, PREPOSITIONS, TRANSITIVE

_KINDS = ("no PP", "PP on object", "PP on subject")
_TRAIN, _DEV = 4000, 500


def make(random_: random.Random, items: int) -> Probe:
    """Training has sentences of all kinds as they are, and passives of the first two kinds; nouns
    of the tests are not in it. After Mueller et al. 2022, scaled down."""
    nouns = random_.sample([*ANIMATE, *OBJECTS], len(ANIMATE) + len(OBJECTS))
    unseen, seen = nouns[:20], nouns[20:]
    records: dict[Record, None] = {}
    while len(records) < _TRAIN + _DEV:
        kind, passive = random_.choice(_KINDS), random_.random() < 0.5
        if not (passive and kind == "PP on subject"):
            records[_record(random_, seen, kind, passive)] = None
    tasks = []
    for name, kinds, about in (
        ("passivization", _KINDS[:2], "as in training, of unseen nouns"),
        (
            "passivization-subject-pp",
            _KINDS[2:],
            "with a PP on the subject, unlike any in training",
        ),
    ):
        tests: dict[Record, str] = {}
        while len(tests) < items:
            kind = kinds[len(tests) % len(kinds)]
            tests[_record(random_, unseen, kind, True)] = kind
        found = [
            {"prompt": prompt, "answer": answer.strip(), "group": kind}
            for (prompt, answer), kind in tests.items()
        ]
        how = {"check": "exact", "max_tokens": 64, "stop": ["\n"]}
        tasks.append(
            ProbeTask(name, f"Active sentences in the passive, {about}.", found, None, how)
        )
    train = list(records)
    return Probe(tasks, train[:_TRAIN], train[_TRAIN:])


def _record(random_: random.Random, nouns: list[str], kind: str, passive: bool) -> Record:
    subject, object_ = (f"{random_.choice(('a', 'the'))} {n}" for n in random_.sample(nouns, 2))
    pp = f" {random_.choice(PREPOSITIONS)} the {random_.choice(PLACES)}"
    subject += pp if kind == "PP on subject" else ""
    object_ += pp if kind == "PP on object" else ""
    _, past, participle = random_.choice(TRANSITIVE)
    active = f"{subject} {past} {object_} ."
    answer = f"{object_} was {participle} by {subject} ." if passive else active
    return f"sentence: {active}\n{'passive' if passive else 'same'}:", f" {answer}"
