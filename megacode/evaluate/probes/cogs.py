"""Logical forms of sentences, after COGS (arXiv 2010.05465): eight cases that training lacks.

A form is variable-free: `the cat saw a dog on the bed .` is
`see ( agent = * cat , theme = dog ( nmod . on = * bed ) )`, where `*` marks `the`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megacode.evaluate.probes.probe import Probe, ProbeTask, Record
from megacode.evaluate.probes.words import (
    ANIMATE,
    CLAUSAL,
    DATIVE,
    NAMES,
    OBJECTS,
    PLACES,
    PREPOSITIONS,
    TRANSITIVE,
    UNACCUSATIVE,
)

_TRAIN, _DEV, _DEEPEST = 8000, 500, 2
_LEXICAL = ("subject to object", "object to subject", "name alone to subject", "active to passive",
            "passive to active")  # fmt: skip
_STRUCTURAL = ("PP recursion", "CP recursion", "PP on subject")


class Phrase(NamedTuple):
    """Words, and the form that they have."""

    text: str
    form: str


def noun(determiner: str, word: str) -> Phrase:
    return Phrase(f"{determiner} {word}", f"* {word}" if determiner == "the" else word)


def attached(head: Phrase, preposition: str, inner: Phrase) -> Phrase:
    """`head preposition inner`."""
    return Phrase(
        f"{head.text} {preposition} {inner.text}",
        f"{head.form} ( nmod . {preposition} = {inner.form} )",
    )


def active(verb: tuple[str, ...], agent: Phrase, theme: Phrase) -> Phrase:
    return Phrase(
        f"{agent.text} {verb[1]} {theme.text}",
        f"{verb[0]} ( agent = {agent.form} , theme = {theme.form} )",
    )


def passive(verb: tuple[str, ...], theme: Phrase, agent: Phrase | None) -> Phrase:
    by, form = (f" by {agent.text}", f"agent = {agent.form} , ") if agent else ("", "")
    return Phrase(f"{theme.text} was {verb[2]}{by}", f"{verb[0]} ( {form}theme = {theme.form} )")


def unaccusative(verb: tuple[str, ...], theme: Phrase) -> Phrase:
    return Phrase(f"{theme.text} {verb[1]}", f"{verb[0]} ( theme = {theme.form} )")


def dative(
    verb: tuple[str, ...], agent: Phrase, theme: Phrase, recipient: Phrase, double: bool
) -> Phrase:
    """`double`: the recipient comes before the theme, without `to`."""
    objects = f"{recipient.text} {theme.text}" if double else f"{theme.text} to {recipient.text}"
    roles = f"agent = {agent.form} , theme = {theme.form} , recipient = {recipient.form}"
    return Phrase(f"{agent.text} {verb[1]} {objects}", f"{verb[0]} ( {roles} )")


def clausal(verb: tuple[str, ...], agent: Phrase, clause: Phrase) -> Phrase:
    return Phrase(
        f"{agent.text} {verb[1]} that {clause.text}",
        f"{verb[0]} ( agent = {agent.form} , ccomp = {clause.form} )",
    )


@dataclass(frozen=True)
class _Grammar:
    """Words by where training has them. The held-out words are in one place only."""

    random_: random.Random
    subjects: list[str]
    objects: list[str]
    names: list[str]
    only_subjects: list[str]
    only_objects: list[str]
    only_alone: list[str]
    verbs: list[tuple[str, ...]]
    only_active: list[tuple[str, ...]]
    only_passive: list[tuple[str, ...]]

    def agent(self) -> Phrase:
        if self.random_.random() < 0.5:
            return self._name()
        return self._noun([*self.subjects, *self.only_subjects])

    def theme(self, depth: int = 0) -> Phrase:
        """With `depth` nested PPs."""
        head = self._noun([*self.subjects, *self.objects, *self.only_objects])
        return self._with_pps(head, depth)

    def _with_pps(self, head: Phrase, depth: int) -> Phrase:
        if not depth:
            return head
        inner = self._with_pps(self._noun(PLACES), depth - 1)
        return attached(head, self.random_.choice(PREPOSITIONS), inner)

    def _noun(self, words: list[str]) -> Phrase:
        return noun(self.random_.choice(("a", "the")), self.random_.choice(words))

    def _name(self) -> Phrase:
        return Phrase(*[self.random_.choice(self.names)] * 2)

    def passive_subject(self) -> Phrase:
        return self._noun([*self.subjects, *self.objects])

    def clause(self) -> Phrase:
        """A clause of training without CP."""
        pick = self.random_.choice
        to = pick((self._name(), self._noun(self.subjects)))
        kinds: dict[Callable[[], Phrase], int] = {
            lambda: active(self._active(), self.agent(), self.theme()): 25,
            lambda: active(self._active(), self.agent(), self.theme(pick((1, _DEEPEST)))): 20,
            lambda: passive(self._passive(), self.passive_subject(), self.agent()): 15,
            lambda: passive(self._passive(), self.passive_subject(), None): 10,
            lambda: unaccusative(pick(UNACCUSATIVE), self.passive_subject()): 10,
            lambda: dative(pick(DATIVE), self.agent(), self.theme(), to, pick((True, False))): 20,
        }
        return self.random_.choices(list(kinds), list(kinds.values()))[0]()

    def _active(self) -> tuple[str, ...]:
        return self.random_.choice([*self.verbs, *self.only_active])

    def _passive(self) -> tuple[str, ...]:
        return self.random_.choice([*self.verbs, *self.only_passive])

    def nested(self, depth: int) -> Phrase:
        """A clause under `depth` verbs of saying."""
        if not depth:
            return self.clause()
        return clausal(self.random_.choice(CLAUSAL), self.agent(), self.nested(depth - 1))

    def sentence(self) -> Phrase:
        return self.nested(self.random_.choices((0, 1, 2), (85, 10, 5))[0])

    def case(self, name: str) -> Phrase:
        """A sentence of a kind that training lacks."""
        pick, deep = self.random_.choice, self.random_.randint(_DEEPEST + 1, 5)
        makers: dict[str, Callable[[], Phrase]] = {
            "subject to object": lambda: active(
                pick(self.verbs), self.agent(), self._noun(self.only_subjects)
            ),
            "object to subject": lambda: active(
                pick(self.verbs), self._noun(self.only_objects), self.theme()
            ),
            "name alone to subject": lambda: active(
                pick(self.verbs), Phrase(*[pick(self.only_alone)] * 2), self.theme()
            ),
            "active to passive": lambda: passive(
                pick(self.only_active), self.passive_subject(), self.agent()
            ),
            "passive to active": lambda: active(
                pick(self.only_passive), self.agent(), self.theme()
            ),
            "PP recursion": lambda: active(pick(self.verbs), self.agent(), self.theme(deep)),
            "CP recursion": lambda: self.nested(deep),
            "PP on subject": lambda: active(
                pick(self.verbs), self._with_pps(self._noun(self.subjects), 1), self.theme()
            ),
        }
        return makers[name]()


def make(random_: random.Random, items: int) -> Probe:
    """`cogs-test` is like training; the cases of `cogs-lexical` have words in new places, those of
    `cogs-structural` have structures that training lacks. `items` are those of a task."""
    grammar = _grammar(random_)
    seen: dict[Record, None] = {}
    while len(seen) < _TRAIN + _DEV + items:
        seen[_record(grammar.sentence())] = None
    known = list(seen)
    alone = [_record(Phrase(name, name)) for name in grammar.only_alone] * (_TRAIN // 400)
    train = [*known[: _TRAIN - len(alone)], *alone]
    random_.shuffle(train)
    tasks = [_task("cogs-test", "like those of training", dict.fromkeys(known[-items:], ""))]
    for name, cases, about in (
        ("cogs-lexical", _LEXICAL, "with a word in a place where training does not have it"),
        ("cogs-structural", _STRUCTURAL, "of structures that training does not have"),
    ):
        tests: dict[Record, str] = {}
        while len(tests) < items:
            case = cases[len(tests) % len(cases)]
            tests.setdefault(_record(grammar.case(case)), case)
        tasks.append(_task(name, about, tests))
    return Probe(tasks, train, known[_TRAIN : _TRAIN + _DEV])


def _task(name: str, about: str, tests: dict[Record, str]) -> ProbeTask:
    found = [
        {"prompt": prompt, "answer": form.strip(), "group": case}
        for (prompt, form), case in tests.items()
    ]
    how = {"check": "exact", "max_tokens": 256, "stop": ["\n"]}
    return ProbeTask(name, f"Logical forms of sentences {about}.", found, None, how)


def _record(phrase: Phrase) -> Record:
    return f"sentence: {phrase.text} .\nform:", f" {phrase.form}"


def _grammar(random_: random.Random) -> _Grammar:
    animate = random_.sample(ANIMATE, len(ANIMATE))
    names = random_.sample(NAMES, len(NAMES))
    verbs = random_.sample(TRANSITIVE, len(TRANSITIVE))
    return _Grammar(
        random_,
        subjects=animate[8:],
        objects=list(OBJECTS),
        names=names[4:],
        only_subjects=animate[:4],
        only_objects=animate[4:8],
        only_alone=names[:4],
        verbs=verbs[4:],
        only_active=verbs[:2],
        only_passive=verbs[2:4],
    )
