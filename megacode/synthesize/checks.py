"""What is looked at in accepted rows, in the order of their candidates: equal input, equal result.

A row is refused that shares a run of words with a test set, or is much like a row before it.
`majority` votes among the samples of a record, which only who has all of them can ask for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacode.corpus.inputs import find_inputs
from megacode.corpus.readers import BadRecord, read_input
from megacode.errors import UserError
from megacode.synthesize import schema
from megacode.synthesize.answers import same_answer
from megacode.synthesize.expressions import math_verify

_FEWEST = 3
"""Words of a test set's text that is looked for; fewer are labels and numbers."""
_SHOWN = 120


def row_text(row: Mapping[str, Any]) -> str:
    """What checks look at: the contents of the messages, each a paragraph or more, or the text."""
    if "messages" in row:
        return "\n\n".join(message["content"] for message in row["messages"])
    return str(row["text"])


def majority(answers: Sequence[str]) -> list[bool]:
    """Which of a record's answers are those that most samples give; of a tie, none.

    A blank answer is no vote. Of several spellings the first stands for all.
    """
    firsts: list[str] = []
    classes: list[int | None] = []
    for answer in answers:
        if not answer.strip():
            classes.append(None)
            continue
        for number, first in enumerate(firsts):
            if answer == first or same_answer(first, answer):
                classes.append(number)
                break
        else:
            classes.append(len(firsts))
            firsts.append(answer)
    votes = [classes.count(number) for number in range(len(firsts))]
    best = max(votes, default=0)
    if votes.count(best) != 1:
        return [False] * len(answers)
    return [number == votes.index(best) for number in classes]


@dataclass(frozen=True)
class OpenChecks:
    """The checks of a synthesis file, with what they have seen."""

    held_out: HeldOut | None
    seen: SeenTexts | None

    def reject(self, row: Mapping[str, Any], id: str) -> tuple[str, str]:
        """Reason and detail, both blank for a row that is accepted; later rows are compared with
        that one by its `id`."""
        text = row_text(row)
        if self.held_out and (detail := self.held_out.found(text)):
            return "in a test set", detail
        if self.seen and (like := self.seen.seen(text, id)):
            return "near duplicate", f"of {like}"
        return "", ""


def open_checks(checks: schema.Checks, folder: Path) -> OpenChecks:
    """The checks, with paths relative to `folder`.

    Raises:
        UserError: a test set cannot be read, or a library is not installed.
    """
    if checks.majority:
        math_verify()
    return OpenChecks(
        HeldOut(checks.held_out, folder) if checks.held_out else None,
        SeenTexts(checks.near_duplicates) if checks.near_duplicates else None,
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(words: Sequence[str], n: int) -> Iterator[str]:
    return (" ".join(words[at : at + n]) for at in range(len(words) - n + 1))


# --------------------------------------------------------------------------------- near-duplicates


class SeenTexts:
    """Texts so far, by MinHash. A row takes 4 bytes for each permutation, and LSH's tables."""

    def __init__(self, how: schema.NearDuplicates) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError(
                "near_duplicates needs datasketch; pip install 'megacode[synthesis]'"
            ) from None
        self._how = how
        self._minhash: Callable[[], Any] = lambda: MinHash(num_perm=how.permutations)
        # What LSH finds is compared by all permutations: it should rather find too much.
        self._tables = MinHashLSH(how.threshold, how.permutations, weights=(0.1, 0.9))
        self._ids: list[str] = []
        self._values: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
        self._short: dict[str, str] = {}

    def seen(self, text: str, id: str) -> str:
        """The id of the likest row before, the first of several; blank, and the text is kept, if
        none is as like as the threshold.

        A text of fewer words than an n-gram is compared whole, without regard to case and blanks.
        """
        words = _words(text)
        if len(words) < self._how.ngram:
            whole = " ".join(text.lower().split())
            like = self._short.get(whole, "")
            self._short.setdefault(whole, id)
            return like
        minhash = self._minhash()
        grams = sorted(set(_ngrams(words, self._how.ngram)))
        minhash.update_batch([gram.encode(errors="replace") for gram in grams])
        values = minhash.hashvalues.astype(np.uint32)
        best, like = -1.0, ""
        for number in sorted(self._tables.query(minhash)):
            similarity = float(np.mean(values == self._values[number]))
            if similarity >= self._how.threshold and similarity > best:
                best, like = similarity, self._ids[number]
        if not like:
            self._tables.insert(len(self._ids), minhash)
            self._ids.append(id)
            self._values.append(values)
        return like


# --------------------------------------------------------------------------------------- test sets


class HeldOut:
    """Runs of words of test sets -> where they are from."""

    def __init__(self, how: schema.Decontamination, folder: Path) -> None:
        self._ngram = how.ngram
        self._places: list[str] = []
        self._runs: dict[str, int] = {}
        self._short: dict[str, int] = {}
        for name in how.files:
            most = 0
            path = folder / Path(name).expanduser()
            files = find_inputs([path], on_link=_refuse_link)
            for item in (item for file in files for item in read_input(file, "")):
                if isinstance(item, BadRecord):
                    raise UserError(
                        f"{path}, record {item.record}: {item.reason}; a test set has whole records"
                    )
                self._places.append(f"{name} record {item.record}")
                for text in _texts(dict(item.values)):
                    words = _words(text)
                    most = max(most, len(words))
                    self._add(words)
            if most < _FEWEST:
                raise UserError(
                    f"{path}: has no text of {_FEWEST} words or more, so that nothing can be found "
                    "in it; name a test set with texts in `held_out`"
                )

    def _add(self, words: list[str]) -> None:
        place = len(self._places) - 1
        if len(words) >= self._ngram:
            for run in _ngrams(words, self._ngram):
                self._runs.setdefault(run, place)
        elif len(words) >= _FEWEST:
            self._short.setdefault(" ".join(words), place)

    def found(self, text: str) -> str:
        """Where the first run of words of the text is from; blank if from nowhere.

        A test set's text that is shorter than an n-gram is found where it is the whole text, or a
        whole paragraph or line of it.
        """
        words = _words(text)
        for run in _ngrams(words, self._ngram):
            if run in self._runs:
                return self._told(self._runs[run], run)
        for part in (text, *re.split(r"\n\s*\n", text), *text.splitlines()):
            if (run := " ".join(_words(part))) in self._short:
                return self._told(self._short[run], run)
        return ""

    def _told(self, place: int, run: str) -> str:
        shown = run if len(run) <= _SHOWN else run[: _SHOWN - 3] + "..."
        return f"{self._places[place]} shares: '{shown}'"


def _refuse_link(path: Path) -> None:
    raise UserError(f"{path}: a link that leads out of the test set; name what it leads to")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
