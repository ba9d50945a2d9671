r"""Final answers: where a text gives one, and whether two of them are the same.

`same_answer` compares text, then numbers, then LaTeX (`expressions`). What is beyond the limits is
compared as text alone: a wrong "not the same" costs a candidate, a hang costs the run.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megacode.synthesize.expressions import same_expression

_LONGEST = 1_000
"""Characters of an answer beyond which it is compared as text."""


def same_answer(a: object, b: object) -> bool:
    """Whether two answers are the same; blank ones never are.

    Numbers are compared by value (1,000 = 1e3; 0.5 = 1/2 = 50%), never rounded. A unit counts: 5 cm
    is neither 5 nor 50 mm.

    Raises:
        UserError: LaTeX has to be compared, and math_verify is not installed.
    """
    first, second = _plain(a), _plain(b)
    if not first or not second:
        return False
    if _textual(first) == _textual(second):
        return True
    if max(len(first), len(second)) > _LONGEST:
        return False
    first, second = _without_name(first, second), _without_name(second, first)
    one, other = _quantity(first), _quantity(second)
    if one and other:
        return one == other
    if _words(first) != _words(second):
        return False
    if "," in first and (first[0] in "([") != (second[0] in "(["):  # in order, or in any
        return _textual(first.strip("()[]")) == _textual(second.strip("()[]"))
    return same_expression(_WORDS.sub("", first).strip(), _WORDS.sub("", second).strip())


# ------------------------------------------------------------------------------ where an answer is

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_MARK = re.compile(
    r"^[ \t>#*_-]*(?:the |my )?(?:final |correct )?answer[ \t*_]*(?::|(?<=[*_])$|$)[ \t*_]*"
    r"|\bthe (?:final |correct )?answer is\b[ \t]*:?[ \t*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_RULE = re.compile(r"^[ \t]*####[ \t]+(.+?)\s*\Z", re.MULTILINE)


def final_answer(text: str) -> str:
    r"""What a text gives as its answer: the last `\boxed{...}`, else what follows `#### ` in the
    last line, else the last `Answer:` or `The answer is`. Blank if there is none."""
    ends = _closing(text)
    for box in reversed(list(_BOX.finditer(text))):
        if box.end() in ends:
            return text[box.end() : ends[box.end()]].strip()
    marks = list(_MARK.finditer(text))
    rule = _RULE.search(text)
    if rule and not any(mark.end() > rule.start() for mark in marks):
        return _trimmed(rule[1])
    if not marks:
        return ""
    mark, rest = marks[-1], text[marks[-1].end() :].lstrip()
    line = rest.split("\n", 1)[0]
    if mark[0].lower().rstrip(" \t:*_").endswith(" is"):
        line = re.split(r"[.;]\s", line)[0]
    return _trimmed(line)


def _closing(text: str) -> dict[int, int]:
    """Where braces open (the place behind) -> where they close."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for brace in re.finditer(r"\\[\\{}]|[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            found[opened.pop()] = brace.start()
    return found


def _trimmed(line: str) -> str:
    line = line.strip().strip("*_`").strip().removesuffix(".").strip("*_` \t")
    if len(line) > 2 and line.startswith("$") and line.endswith("$") and line.count("$") == 2:
        line = line[1:-1].strip()
    return line


# ------------------------------------------------------------------------------------- plain forms

_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "⁄": "/", "π": r"\pi ",
     "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "\xa0": " ", "\u202f": "", "\u2009": ""}
)  # fmt: skip
_WRAPPED = re.compile(r"^\s*(?:\\f?box(?:ed)?|\\text|\\mathrm|\\mathbf|\\textbf)\s*\{")
_SPACES = re.compile(r"(?<!\\)\\(?:[!,;:> ]|q?quad(?![A-Za-z]))|~")
_GROUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(_GROUP.pattern + "|°")
_NAME = re.compile(r"^\s*(?:[A-Za-z]|\\[a-z]+)(?:_\w|_\{\w+\})?\s*=\s*(?=[^=])")


def _plain(answer: object) -> str:
    """One line of text without delimiters of LaTeX, spacing commands and a full stop."""
    text = "" if answer is None else str(answer)
    if len(text) > 4 * _LONGEST:
        return " ".join(text.split())
    text = " ".join(text.translate(_SIGNS).split())
    while True:
        before = text
        text = text.strip().strip("*`").removesuffix(".").strip()
        for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
                text = text[len(start) : -len(end)]
        if (wrapped := _WRAPPED.match(text)) and _closing(text).get(wrapped.end()) == len(text) - 1:
            text = text[wrapped.end() : -1]
        if text == before:
            break
    text = text.replace(r"\$", "").replace("$", "").replace(r"\%", "%")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", "°", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    return _SPACES.sub("", re.sub(r"\\text\s*\{\s*\}", "", text)).strip()


def _textual(text: str) -> str:
    """What is compared as text: words without regard to case, anything else without blanks."""
    words = _GROUP.sub(r"\1", text)
    if re.fullmatch(r"[^\W\d_][\w ,.'\-()]*|\([A-Za-z]\)", words):
        lone = re.fullmatch(r"\(?([A-Za-z])\)?", words)  # a choice: (B) or B
        return lone[1].casefold() if lone else " ".join(words.casefold().split())
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", words)


def _without_name(text: str, other: str) -> str:
    """`x = 5` is 5, unless the other answer has a name, too."""
    if text.count("=") == 1 and "=" not in other:
        return _NAME.sub("", text)
    return text


def _words(text: str) -> str:
    """Text inside LaTeX (units, mostly), and degrees."""
    return re.sub(r"\s+", " ", "|".join(word[0] for word in _WORDS.finditer(text)))


# ----------------------------------------------------------------------------------------- numbers

_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)?(?:\.\d+)?"
_UNIT = r"(?P<unit>%|[°A-Za-zµΩ€£][A-Za-zµΩ°/^0-9 .\-]*)?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-])?\s*(?:"
    rf"\\frac\s*(?:\{{\s*(?P<top>[+-]?\d+)\s*\}}|(?P<t>\d))\s*(?:\{{\s*(?P<under>\d+)\s*\}}|(?P<u>\d))"
    rf"|(?P<mixed>\d+)(?:\s+(?P<n>\d+)\s*/\s*(?P<d>\d+)|\s*\\frac\{{(?P<mn>\d+)\}}\{{(?P<md>\d+)\}})"
    rf"|(?P<over>{_DIGITS})\s*/\s*(?P<by>\d+(?:\.\d+)?)"
    rf"|(?P<plain>{_DIGITS})(?:[eE](?P<e>[+-]?\d+)"
    rf"|\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*(?:\{{\s*(?P<p>[+-]?\d+)\s*\}}|(?P<q>[+-]?\d+)))?"
    rf")\s*{_UNIT}"
)


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Number and unit of a text that is just these."""
    match = _NUMBER.fullmatch(re.sub(r"\s+", " ", _GROUP.sub(r" \1", text)).strip())
    if not match:
        return None
    part = match.groupdict()
    try:
        if part["top"] or part["t"]:
            value = Fraction(int(part["top"] or part["t"]), int(part["under"] or part["u"]))
        elif part["mixed"]:
            value = int(part["mixed"]) + Fraction(
                int(part["n"] or part["mn"]), int(part["d"] or part["md"])
            )
        elif part["over"]:
            value = _decimal(part["over"]) / _decimal(part["by"])
        else:
            power = int(part["e"] or part["p"] or part["q"] or 0)
            if abs(power) > 400:
                return None
            value = _decimal(part["plain"]) * Fraction(10) ** power
    except (ValueError, ZeroDivisionError):
        return None
    unit = " ".join((part["unit"] or "").split())
    if unit == "%":
        value, unit = value / 100, ""
    return (-value if part["sign"] == "-" else value), unit


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace("{,}", "").replace(",", ""))
