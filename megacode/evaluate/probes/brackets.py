"""Brackets: which of three closers follows nested openers with nonce names between them."""

from __future__ import annotations

import random

from megacode.evaluate.probes.probe import Item, Probe, ProbeTask, block
from megacode.evaluate.probes.words import nonces

OPENERS, CLOSERS = "([{", ")]}"
_DEPTHS = {"brackets": (1, 2, 3, 4), "brackets-outer": (2, 3, 4)}


def make(random_: random.Random, items: int) -> Probe:
    """`brackets`: the closer of the innermost bracket. `brackets-outer`: of the outermost, after
    the others are closed; the last opener does not tell it."""
    tasks = []
    for name, depths in _DEPTHS.items():
        found: list[Item] = []
        while len(found) < items:
            depth = depths[len(found) // 3 % len(depths)]
            kinds, names = (
                [random_.randrange(3) for _ in range(depth)],
                nonces(random_, 2 * depth + 1),
            )
            asked = depth - 1 if name == "brackets" else 0
            prompts = []
            for right in range(3):  # every kind one further, until the asked one is `right`
                turned = [(kind + right - kinds[asked]) % 3 for kind in kinds]
                opened = ", ".join(
                    f"{names[2 * i + 1]}{OPENERS[kind]}{names[2 * i + 2]}"
                    for i, kind in enumerate(turned)
                )
                closed = "".join(CLOSERS[kind] for kind in reversed(turned[asked + 1 :]))
                prompts.append(f"{names[0]} = {opened}{closed}")
            found += block(prompts, CLOSERS, len(found) // 3, [f"depth {depth}"] * 3)
        which = "innermost" if name == "brackets" else "outermost"
        about = f"Which closer follows: that of the {which} open bracket."
        tasks.append(ProbeTask(name, about, found, {"score": "label"}, baselines={"chance": 1 / 3}))
    return Probe(tasks)
