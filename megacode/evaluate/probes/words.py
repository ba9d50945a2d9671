"""Words that prompts are made of."""

from __future__ import annotations

import random

from megacode.evaluate.probes.probe import is_held_out

ANIMATE = (
    "baby bear bird boy cat chicken child doctor dog duck farmer fish friend frog girl guest "
    "horse king lion monkey mouse nurse pilot poet queen rabbit student teacher turtle writer"
).split()
OBJECTS = (
    "ball balloon basket book bottle brick cake chair cloth cookie crayon cup donut drink glass "
    "hammer hat key lamp leaf melon pen pencil radish ring rose shell shirt tool"
).split()
PLACES = "bed boat car garden house room stage table tent tree".split()
NAMES = (
    "Abigail Aiden Alexander Amelia Aria Ava Avery Benjamin Camila Charlotte Daniel Elijah Ella "
    "Emily Emma Ethan Evelyn Harper Henry Isabella Jackson Jacob James Liam Logan Lucas Mason "
    "Matthew Mia Michael Mila Noah Oliver Olivia Scarlett Sebastian Sofia Sophia William Zoe"
).split()
PREPOSITIONS = ["beside", "in", "on"]
# Base, past, participle.
TRANSITIVE = [
    tuple(forms.split())
    for forms in (
        "see saw seen", "eat ate eaten", "help helped helped", "find found found",
        "draw drew drawn", "clean cleaned cleaned", "like liked liked", "hold held held",
        "paint painted painted", "touch touched touched", "notice noticed noticed",
        "carry carried carried",
    )
]  # fmt: skip
DATIVE = [("give", "gave"), ("lend", "lent"), ("mail", "mailed"), ("offer", "offered"),
          ("sell", "sold"), ("send", "sent")]  # fmt: skip
UNACCUSATIVE = [("break", "broke"), ("burn", "burned"), ("float", "floated"), ("freeze", "froze"),
                ("grow", "grew"), ("roll", "rolled")]  # fmt: skip
CLAUSAL = [("believe", "believed"), ("claim", "claimed"), ("hope", "hoped"), ("know", "knew"),
           ("say", "said"), ("think", "thought")]  # fmt: skip


def nonce(random_: random.Random, held_out: bool | None = None) -> str:
    """A word of three syllables that is none; of the words for tests, or of the others."""
    while True:
        syllables = (random_.choice("bdfgklmnprstvz") + random_.choice("aeiou") for _ in range(3))
        word = "".join(syllables)
        if held_out is None or is_held_out(word) == held_out:
            return word


def nonces(random_: random.Random, count: int) -> list[str]:
    """So many different nonce words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[nonce(random_)] = None
    return list(found)
