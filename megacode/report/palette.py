"""Colours of the page and of all plots, light and dark; colour-blind readers can tell them apart.

Hues are Okabe and Ito's ("Color Universal Design", 2008). Plots are drawn in the light colours; in
a page's SVG `css_variables` replaces them by CSS variables, so that one SVG serves both schemes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import cycle

_COLOURS = {  # light, dark
    "ink": ("#1d2329", "#e4e7ea"),
    "faint": ("#66707a", "#9aa4ae"),
    "grid": ("#e6e8eb", "#2d343b"),
    "paper": ("#ffffff", "#14181c"),
    "band": ("#f3f5f7", "#1c2227"),
    "blue": ("#0072b2", "#56aee0"),
    "vermilion": ("#d55e00", "#f2894a"),
    "green": ("#009e73", "#35c79e"),
    "purple": ("#b3588f", "#e09bc4"),
    "amber": ("#c98a00", "#f0bd4e"),
    "sky": ("#3d9cd6", "#9bd2f5"),
    "grey": ("#5b6670", "#b6bfc8"),
}
LIGHT = {name: light for name, (light, _) in _COLOURS.items()}
DARK = {name: dark for name, (_, dark) in _COLOURS.items()}
INK, FAINT, GRID, PAPER, BAND, *HUES = LIGHT.values()
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def domain_colours(domains: Iterable[str]) -> dict[str, str]:
    """Light colour of each domain: code, text and math have their own, others take the rest."""
    names = list(dict.fromkeys(domains))
    preferred = dict(zip(("code", "text", "math"), HUES, strict=False))
    taken = {name: preferred[name] for name in names if name in preferred}
    free = cycle(colour for colour in HUES if colour not in taken.values())
    return {name: taken.get(name) or next(free) for name in names}


def css_variables(text: str) -> str:
    """`text` (an SVG, a style) with CSS variables instead of light colours."""
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)
