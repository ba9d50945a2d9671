"""Quotes and agreement: one of two, each right in one half of a pair."""

from __future__ import annotations

import random

from megacode.evaluate.probes.probe import Item, Probe, ProbeTask, block
from megacode.evaluate.probes.words import nonces

_QUOTES = ('"', "'")
_NOUNS = (
    "apple bag bell boat book bottle box bridge car card chair clock coat coin cup door engine "
    "flower garden glass hat house key lamp letter machine map note pen picture plant plate ring "
    "road shirt shoe stone table tower tree wall window"
).split()
_PREPOSITIONS = "above behind below beside near under".split()


def make_quotes(random_: random.Random, items: int) -> Probe:
    """A string that is open, alone or after a closed one in the other quotes."""
    found: list[Item] = []
    while len(found) < items:
        group = ("one string", "after another string")[len(found) // 2 % 2]
        first, second, third, fourth, *words = nonces(random_, random_.randint(5, 7))
        prompts = []
        for quote, other in (_QUOTES, _QUOTES[::-1]):
            before = f"{other}{third} {fourth}{other}, " if group != "one string" else ""
            prompts.append(f"{first} = {second}({before}{quote}{' '.join(words)}")
        found += block(prompts, _QUOTES, len(found) // 2, [group] * 2)
    about = "Which quote closes the string."
    return Probe(
        [ProbeTask("quotes", about, found, {"score": "label"}, baselines={"chance": 1 / 2})]
    )


def make_agreement(random_: random.Random, items: int) -> Probe:
    """Subject and a second noun, each in both numbers: four items, in two blocks."""
    found: list[Item] = []
    while len(found) < items:
        subject, second = random_.sample(_NOUNS, 2)
        preposition = random_.choice(_PREPOSITIONS)
        for differs in (False, True):
            prompts = [
                f"The {_number(subject, plural)} {preposition} the "
                f"{_number(second, plural != differs)}"
                for plural in (False, True)
            ]
            group = "second noun differs" if differs else "second noun alike"
            found += block(prompts, (" is", " are"), len(found) // 4, [group] * 2)
    about = "Whether `is` or `are` follows a subject with a second noun behind it."
    task = ProbeTask("agreement", about, found, {"score": "label"}, baselines={"chance": 1 / 2})
    return Probe([task])


def _number(noun: str, plural: bool) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s") * plural
