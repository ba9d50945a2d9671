"""A model's reply -> its tag, body and sections, as an operator's `read` asks for them.

Models put markup, numbers, fences and leads where none were asked for; that is passed over. What
was asked for has to be there.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_THOUGHT = re.compile(r"\s*<think(?:ing)?>(?:.*?</think(?:ing)?>|.*\Z)", re.DOTALL | re.IGNORECASE)
_LATE_END = re.compile(r"\A(?:(?!<think).)*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(?P<mark>```+|~~~+)(?P<info>[^\n`]*)$", re.MULTILINE)
_LEADS = frozenset("verdict judgement judgment decision tag label result conclusion rating".split())


@dataclass(frozen=True)
class Reply:
    """`text`: all of it but thoughts; `body`: without the line of the tag and a fence around it."""

    text: str
    body: str
    tag: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be used, such as `no tag`."""


def read_reply(text: str, tags: Sequence[str] = (), sections: Sequence[str] = ()) -> Reply:
    """A reply, read."""
    text = without_thoughts(text)
    body, tag = unfenced(text), ""
    if not text:
        return Reply(text, body, problem="empty reply")
    if tags:
        tag, body = read_tag(body, tags)
        if not tag:
            return Reply(text, body, problem="no tag")
    found = read_sections(body, sections)
    for name in sections:
        if not found[name]:
            return Reply(text, body, tag, found, f"no section {name}")
    return Reply(text, body, tag, found)


def without_thoughts(text: str) -> str:
    """The text after `<think>...</think>`; also where the model was given the first of the two, or
    never wrote the last."""
    if match := _THOUGHT.match(text) or _LATE_END.match(text):
        text = text[match.end() :]
    return text.strip()


def unfenced(text: str) -> str:
    """The content of the fence that is around the whole text, if there is one."""
    text = text.strip()
    fences = _fences(text)
    if len(fences) == 1 and (fences[0].start, fences[0].end) == (0, len(text)):
        return fences[0].content.strip()
    return text


def fenced(text: str) -> str:
    """The longest fenced block of a text; the text itself if it has none."""
    blocks = [fence.content.strip("\n").rstrip() for fence in _fences(text)]
    return max(blocks, key=len) if blocks else text.strip()


class _Fence(NamedTuple):
    start: int
    end: int
    content: str


def _fences(text: str) -> list[_Fence]:
    """Closed fences, in order."""
    found = []
    opened: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        if opened is None:
            opened = line
        elif line["mark"] == opened["mark"] and not line["info"].strip():
            content = text[opened.end() + 1 : line.start()]
            found.append(_Fence(opened.start(), line.end(), content))
            opened = None
    return found


# -------------------------------------------------------------------------------------------- tags


def read_tag(text: str, tags: Sequence[str]) -> tuple[str, str]:
    """The tag in the first line, and what follows; without one, a blank and the whole text.

    What stands in the tag's line behind a colon, a full stop or a dash belongs to what follows.
    """
    names = {_word(tag): tag for tag in tags}
    lines = text.split("\n")
    at = _next_line(lines, 0)
    if at < len(lines) and _word(lines[at]) in _LEADS - names.keys():
        at = _next_line(lines, at + 1)
    if at == len(lines):
        return "", text
    line, after = lines[at], "\n".join(lines[at + 1 :])
    if tag := names.get(_word(line)):
        return tag, after.strip()
    head, mark, rest = _split(line)
    if tag := names.get(_word(head)):
        return tag, f"{_bare(rest)}\n{after}".strip()
    if mark.strip() == ":" and len(head.split()) <= 4:  # Verdict: wrong
        if tag := names.get(_word(rest)):
            return tag, after.strip()
        head, _, rest = _split(rest)
        if tag := names.get(_word(head)):
            return tag, f"{_bare(rest)}\n{after}".strip()
    return "", text


def _next_line(lines: list[str], at: int) -> int:
    """The next that has a word."""
    while at < len(lines) and not _word(lines[at]):
        at += 1
    return at


def _split(line: str) -> tuple[str, str, str]:
    match = re.search(r":|\.(?=\W|$)|[ *_]+[-–—]+(?= )|[–—]", line)
    return (line[: match.start()], match[0], line[match.end() :]) if match else (line, "", "")


def _word(text: str) -> str:
    """Lower-case words of a line without a number before them."""
    text = re.sub(r"^\W*\d+[.)]\s", "", text)
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _bare(text: str) -> str:
    """Without markup that was opened before."""
    return re.sub(r"^[\s*_`]+(?=\s|\w|$)", "", text)


# ---------------------------------------------------------------------------------------- sections


def read_sections(text: str, names: Sequence[str]) -> dict[str, str]:
    """What stands under each heading, blank where it is missing.

    A heading that is written twice counts where it has more markup: `### Answer` over `Answer:`.
    """
    found: dict[str, tuple[int, int, int]] = {}  # name -> markup, start, end
    fences = _fences(text)
    patterns = {name: _heading(name) for name in names}
    for line in re.finditer(r"[^\n]+", text):
        before = bisect_right(fences, line.start(), key=lambda fence: fence.start)
        if before and line.start() < fences[before - 1].end:
            continue
        for name, pattern in patterns.items():
            if not (match := pattern.match(line[0])):
                continue
            markup = 3 if match["hash"] else 2 if match["bold"] else 1
            if name not in found or markup > found[name][0]:
                found[name] = (markup, line.start(), line.start() + match.end())
    starts = sorted(start for _, start, _ in found.values())
    sections = dict.fromkeys(names, "")
    for name, (_, start, end) in found.items():
        stop = min((other for other in starts if other > start), default=len(text))
        content = re.sub(r"(?:^|\n)\s*(?:-{3,}|\*{3,}|_{3,}|={3,})\s*\Z", "", text[end:stop])
        sections[name] = content.strip()
    return sections


def _heading(name: str) -> re.Pattern[str]:
    """A line that opens a section: `### Name`, `**Name**`, `2. Name:`, `Name: text`, `Name`."""
    words = r"[ _-]+".join(map(re.escape, name.split("_")))
    return re.compile(
        r"[ \t>]*(?P<hash>#{1,6})?[ \t]*(?:\(?\d{1,2}[.):][ \t]+|[-*][ \t]+)?"
        rf"(?P<bold>\*\*|__|\*)?[ \t\[<]*(?:\d{{1,2}}[.)][ \t]*)?(?:the |new )?{words}[ \t\]>]*"
        r"(?:(?:[:：][ \t]*(?(bold)(?:\*\*|__|\*)?)|(?(bold)(?:\*\*|__|\*)|(?!))[ \t]*[:：]|"
        r"(?(bold)(?:\*\*|__|\*)?)[ \t]*$)[ \t]*)",
        re.IGNORECASE,
    )
