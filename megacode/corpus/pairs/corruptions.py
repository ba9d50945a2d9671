"""Candidates that are not equivalent: (text, language, key) -> another text, or None.

Each differs from the text in its tokens, comments aside. That it computes something else is shown
by running it only (`proof`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from megacode.corpus.pairs.functions import Leaf, leaves

_ATTEMPTS = 8
_SIGNATURE = {"def", "async", "class", "@"}
_KEYWORDS = {
    "python": (
        "if elif else", "for while", "break continue pass", "return yield raise del", "in is",
        "try with", "except finally", "global nonlocal", "async await", "True False None",
    ),
    "javascript": (
        "if switch else", "for while do", "break continue", "return throw yield",
        "in of instanceof", "try catch finally", "new delete typeof void", "null undefined",
        "this super", "async await",
    ),
    "java": (
        "if switch else", "for while do", "break continue", "return throw", "try catch finally",
        "int float char boolean", "this super", "new instanceof", "case default",
    ),
    "c": (
        "if switch else", "for while do", "break continue", "return goto", "struct union enum",
        "int float char void", "signed unsigned", "case default",
    ),
    "go": (
        "if switch else", "for select", "break continue fallthrough", "return goto", "go defer",
        "struct interface map chan", "func range", "case default",
    ),
    "rust": (
        "if match else", "for while loop", "break continue return", "let const static",
        "struct enum union trait", "self super crate", "mut ref move", "as in",
    ),
}  # fmt: skip
"""Groups of keywords; one is replaced by another of its group. Pairs that may leave what is
computed as it is (`public` and `private`, `let` and `const`, `int` and `long`) are in none."""
_KEYWORDS["typescript"] = _KEYWORDS["javascript"]
_KEYWORDS["cpp"] = (*_KEYWORDS["c"], "new delete", "try catch throw")
_OPERATORS = (
    "+ -", "* /", "== !=", "< >=", "<= >", "+= -=", "*= /=", "++ --", "&& ||", "& |", "<< >>",
    "and or", "=== !==", "true false", "True False", "|= &=", "// %", "is in", "<<= >>=",
)  # fmt: skip
_SYMBOLS = ("( [", ") ]", "-> =>", ": ;", ". ,", "{ (", ":= ==")
"""For a text without operators."""


def tokens(text: str, language: str) -> list[str]:
    """The tokens of a text without its comments: what two texts are compared by."""
    return [leaf.text for leaf in leaves(text, language) if leaf.kind != "comment"]


def lines_shuffled(text: str, language: str, key: int) -> str | None:
    """The lines of the body in another order. The signature stays first, a closing brace last.

    Lines that a string or comment joins move together. None if the body has fewer than two lines.
    """
    found = leaves(text, language)
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    joined: set[int] = set()  # numbers of lines that go on with a token of the line before
    number = 0
    for leaf in found:
        while starts[number + 1] <= leaf.start:
            number += 1
        joined.update(range(number + 1, number + 1 + leaf.text.count("\n")))
    first = text.count("\n", 0, _signature_end(found, language)) + 1 if found else 0
    if language == "python" and found and found[0].text not in _SIGNATURE:
        first = 0
    last = len(lines)
    while last > first and not lines[last - 1].strip():
        last -= 1
    if language != "python" and last > first and lines[last - 1].strip()[:1] in ("}", ")"):
        last -= 1
    words: list[list[str]] = [[] for _ in lines]
    number = 0
    for leaf in found:
        while starts[number + 1] <= leaf.start:
            number += 1
        words[number] += [leaf.text] if leaf.kind != "comment" else []
    blocks: list[tuple[str, tuple[str, ...]]] = []
    for at in range(first, last):
        if at in joined and not blocks:  # the signature ends within it
            return None
        if at in joined:
            before, own = blocks.pop()
            blocks.append((f"{before}\n{lines[at]}", (*own, *words[at])))
        elif lines[at].strip():
            blocks.append((lines[at], tuple(words[at])))
    order = _shuffled(blocks, key, lambda order: [word for _, own in order for word in own])
    body = [block for block, _ in order] if order else []
    return "\n".join([*lines[:first], *body, *lines[last:]]) if order else None


def _signature_end(found: Sequence[Leaf], language: str) -> int:
    """Where the colon or brace that opens the body is."""
    depth, seen = 0, language != "python"
    for leaf in found:
        if leaf.kind in ("string", "comment"):
            continue
        seen = seen or leaf.text in ("def", "class")
        if leaf.text == (":" if language == "python" else "{") and not depth and seen:
            return leaf.start
        depth += (leaf.text in ("(", "[", "{")) - (leaf.text in (")", "]", "}"))
    return found[0].start


def tokens_shuffled(text: str, language: str, key: int) -> str | None:
    """The tokens in another order; comments and blank space stay where they are."""
    found = [leaf for leaf in leaves(text, language) if leaf.kind != "comment"]
    order = _shuffled([leaf.text for leaf in found], key, list)
    if order is None:
        return None
    changes = zip(found, order, strict=True)
    return _written(text, ((leaf.start, leaf.end, new) for leaf, new in changes))


def keyword_replaced(text: str, language: str, key: int) -> str | None:
    """One keyword is another one."""
    found = [
        leaf for leaf in leaves(text, language) if leaf.kind not in ("comment", "string", "name")
    ]
    return _replaced(text, key, found, _KEYWORDS[language])


def operator_flipped(text: str, language: str, key: int) -> str | None:
    """One operator is its opposite (`+` and `-`, `==` and `!=`, `not` left out); in a text without
    operators, one symbol is another (`(` and `[`)."""
    found = [leaf for leaf in leaves(text, language) if leaf.kind not in ("comment", "string")]
    extra = {"not": "", "not in": "in", "is not": "is", "!": ""}
    return _replaced(text, key, found, _OPERATORS, extra) or _replaced(text, key, found, _SYMBOLS)


CORRUPTIONS: dict[str, Callable[[str, str, int], str | None]] = {
    "lines-shuffled": lines_shuffled,
    "tokens-shuffled": tokens_shuffled,
    "keyword-replaced": keyword_replaced,
    "operator-flipped": operator_flipped,
}


def _replaced(
    text: str,
    key: int,
    found: Sequence[Leaf],
    groups: tuple[str, ...],
    extra: dict[str, str] | None = None,
) -> str | None:
    """One of the leaves that are in a group becomes another of the group."""
    others: dict[str, list[str]] = {old: [new] for old, new in (extra or {}).items()}
    for group in groups:
        words = group.split()
        for word in words:
            others.setdefault(word, []).extend(one for one in words if one != word)
    places = [leaf for leaf in found if leaf.text in others]
    if not places:
        return None
    chooser = random.Random(key)
    leaf = chooser.choice(places)
    new = chooser.choice(others[leaf.text])
    end = leaf.end + (not new and text[leaf.end : leaf.end + 1] == " ")
    return _written(text, [(leaf.start, end, new)])


Part = TypeVar("Part")


def _shuffled(
    parts: Sequence[Part], key: int, words: Callable[[Sequence[Part]], list[str]]
) -> list[Part] | None:
    """The parts in another order whose words are in another order; None if none is found."""
    before = words(parts)
    for attempt in range(_ATTEMPTS if len(set(parts)) > 1 else 0):
        order = list(parts)
        random.Random(f"{key} {attempt}").shuffle(order)
        if words(order) != before:
            return order
    return None


def _written(text: str, changes: Iterable[tuple[int, int, str]]) -> str:
    """The text with new words for [start, end), in order; words stay apart."""
    pieces = [""]
    last = 0

    def append(piece: str) -> None:
        if _is_word(pieces[-1][-1:]) and _is_word(piece[:1]):
            pieces.append(" ")
        if piece:
            pieces.append(piece)

    for start, end, new in changes:
        append(text[last:start])
        append(new)
        last = end
    append(text[last:])
    return "".join(pieces)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
