"""Copying: of four nonce words, the one that the context has introduced."""

from __future__ import annotations

import random

from megacode.evaluate.probes.probe import Item, Probe, ProbeTask, block
from megacode.evaluate.probes.words import nonces

_FRAMES = {
    "code": (
        "class {word}:\n    pass\n\n\nvalue =",
        "def {word}(x):\n    return x\n\n\nprint(",
        "import {word}\n\nresult =",
        "{word} = [1, 2, 3]\nfor item in",
    ),
    "prose": (
        "Once there was a bird that was called {word}. Everybody in the village loved",
        "We met {word} at the station in the morning. Later we had dinner with",
        "The city of {word} lies by a river. Many people travel to",
        "A letter from {word} came on Monday. Nobody had expected to hear from",
    ),
}


def make(random_: random.Random, items: int) -> Probe:
    """Half of the blocks of four in a frame of code, half in one of prose."""
    found: list[Item] = []
    while len(found) < items:
        group = list(_FRAMES)[len(found) // 4 % 2]
        frame = random_.choice(_FRAMES[group])
        words = nonces(random_, 4)
        blank = "" if frame.endswith("(") else " "
        prompts = [frame.format(word=word) for word in words]
        choices = [blank + word for word in words]
        found += block(prompts, choices, len(found) // 4, [group] * 4)
    about = "Which of four nonce words follows: the context has one of them."
    return Probe(
        [ProbeTask("copying", about, found, {"score": "label"}, baselines={"chance": 1 / 4})]
    )
