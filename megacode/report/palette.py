"""Colours of the page: one for a domain everywhere, told apart by colour-blind readers, light and dark.

Hues are Okabe and Ito's ("Color Universal Design", 2008). Pictures are drawn with placeholder colours that become CSS
variables, so one SVG serves both colour schemes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.colors import is_color_like, to_hex, to_rgba_array

# CSS variable -> (placeholder in pictures, light, dark)
INK = "#010101"
FAINT = "#010102"
GRID = "#010103"
PAPER = "#010104"
BAND = "#010105"
_PAGE = {
    "ink": (INK, "#1d2329", "#e4e7ea"),
    "faint": (FAINT, "#66707a", "#9aa4ae"),
    "grid": (GRID, "#e6e8eb", "#2d343b"),
    "paper": (PAPER, "#ffffff", "#14181c"),
    "band": (BAND, "#f3f5f7", "#1c2227"),
}
_HUES = (  # light, dark
    ("#0072b2", "#56aee0"),  # blue
    ("#d55e00", "#f2894a"),  # vermilion
    ("#009e73", "#35c79e"),  # green
    ("#b3588f", "#e09bc4"),  # purple
    ("#c98a00", "#f0bd4e"),  # amber
    ("#3d9cd6", "#9bd2f5"),  # sky
    ("#5b6670", "#b6bfc8"),  # grey
)
_PREFERRED = {"code": 0, "text": 1, "math": 2}


def placeholder(index: int) -> str:
    """What a picture draws with for the hue of this index."""
    return f"#0102{index:02x}"


def hues(domains: Iterable[str]) -> dict[str, int]:
    """Hue of each domain: code, text and math have their own, others take what is left, in order."""
    names = list(dict.fromkeys(domains))
    taken = {name: _PREFERRED[name] for name in names if name in _PREFERRED}
    free = [index for index in range(len(_HUES)) if index not in taken.values()]
    rest = [name for name in names if name not in taken]
    return taken | {name: free[n % len(free)] for n, name in enumerate(rest)}


def css() -> dict[str, dict[str, str]]:
    """Variables of the two schemes: {"light": {"ink": "#...", "hue0": ...}, "dark": {...}}."""
    schemes: dict[str, dict[str, str]] = {}
    for column, scheme in enumerate(("light", "dark")):
        page = {name: colours[1 + column] for name, colours in _PAGE.items()}
        schemes[scheme] = page | {f"hue{index}": hue[column] for index, hue in enumerate(_HUES)}
    return schemes


def with_variables(svg: str) -> str:
    """Placeholders of a drawn SVG -> CSS variables."""
    for name, (mark, _, _) in _PAGE.items():
        svg = svg.replace(mark, f"var(--{name})")
    for index in range(len(_HUES)):
        svg = svg.replace(placeholder(index), f"var(--hue{index})")
    return svg


def light(colour: Any) -> Any:
    """A placeholder colour, in any of matplotlib's forms, as the light scheme's colour; anything else unchanged."""
    if isinstance(colour, np.ndarray) and colour.ndim == 2:
        return np.array([light(row) for row in colour]).reshape(-1, 4)
    if (isinstance(colour, str) and not colour.startswith("#")) or not is_color_like(colour):
        return colour
    row = to_rgba_array(colour)[0]
    page = {mark: shown for mark, shown, _ in _PAGE.values()}
    page |= {placeholder(index): shown for index, (shown, _) in enumerate(_HUES)}
    found = page.get(to_hex(row[:3]))
    return colour if found is None else (*to_rgba_array(found)[0][:3], row[3])
