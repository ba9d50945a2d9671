r"""Answers, votes, near-duplicates and test sets."""

from __future__ import annotations

import builtins
import gzip
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megacode.errors import UserError
from megacode.synthesize import expressions
from megacode.synthesize.answers import final_answer, same_answer
from megacode.synthesize.checks import HeldOut, SeenTexts, majority, open_checks, row_text
from megacode.synthesize.schema import Checks, Decontamination, NearDuplicates

# ----------------------------------------------------------------------------------------- answers

SAME: list[tuple[object, object]] = [
    ("42", "42."),
    (42, " 42"),
    ("1,000", "1000"),
    ("1e3", "1000"),
    ("1.5E-2", "0.015"),
    ("10{,}000", "10000"),
    (r"1\,000", "1000"),
    ("0.5", "1/2"),
    (".5", "0.50"),
    ("50%", "1/2"),
    (r"50\%", "0.5"),
    ("2/4", "1/2"),
    ("1 1/2", "3/2"),
    (r"1\frac{1}{2}", "1.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"$\tfrac{3}{4}$", "0.75"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    ("-3", "−3"),
    ("+3", "3"),
    ("007", "7"),
    (r"\boxed{7}", "7"),
    (r"\(7\)", "**7**"),
    ("$18", "18"),
    (r"\$1,200.00", "1200"),
    (r"1.5\times10^3", "1500"),
    ("10^3", "1000"),
    ("x = 5", "5"),
    ("y = 2x+1", "2x + 1"),
    ("5 cm", "5.0 cm"),
    (r"5\text{ cm}", "5 cm"),
    (r"2\sqrt{3}\text{ cm}", r"\sqrt{12}\text{ cm}"),
    (r"90^\circ", "90°"),
    (r"100^{\circ}", "100°"),
    ("(B)", "b"),
    ("New  York", "new york."),
    (r"\text{Monday}", "monday"),
    ("(1, 2)", r"\left(1,2\right)"),
    ("(1,2)", "1, 2"),
    ("1, 2", "2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("sqrt(4)", "2"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2x", "x*2"),
    (r"2\pi", "2π"),
    ("2pi", r"\pi\cdot 2"),
    ("1/2", "2^{-1}"),
    ("2^{99}", r"4^{49}\cdot 2"),
    ("x<5", "5>x"),
    (r"3\times 4", "12"),
    (r"(-\infty,3]\cup[4,5)", r"[4,5)\cup(-\infty,3]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]
DIFFERENT: list[tuple[object, object]] = [
    ("", ""),
    (None, None),
    ("42", ""),
    ("42", "43"),
    ("3", "-3"),
    ("1/3", "0.33"),
    ("0.333333", "1/3"),
    ("50%", "50"),
    ("12", "1 2"),
    ("11/2", "1 1/2"),
    ("1/0", "2/0"),
    ("5 cm", "5"),
    ("5 cm", "5 m"),
    ("5 cm", "50 mm"),
    ("5%", "5 cm"),
    (r"2\sqrt{3}\text{ cm}", r"\sqrt{12}"),
    ("x = 5", "y = 5"),
    ("x", "y"),
    ("x^2", "y^2"),
    ("(1,2)", "(2,1)"),
    ("(2,1)", "1, 2"),
    ("(1,2)", "[1,2]"),
    ("[0,1)", "[0,1]"),
    ("1, 2", "1, 2, 3"),
    ("A", "B"),
    ("AB", "BA"),
    ("IV", "VI"),
    ("red", "der"),
    ("blue 5", "red 5"),
    ("I think 5", "5"),
    ("yes", "no"),
    (r"\sqrt{2}", "1.414"),
    (r"\pi", "3.14"),
    ("2^{10}", "1025"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same_answers(a: object, b: object) -> None:
    assert same_answer(a, b) and same_answer(b, a) and same_answer(a, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_answers(a: object, b: object) -> None:
    assert not same_answer(a, b) and not same_answer(b, a)


HOSTILE = [
    "9**9**9**9",
    "10^{10^{10}}",
    "{" * 10_000,
    r"\frac{" * 5_000,
    "(" * 10_000 + ")" * 10_000,
    r"\boxed{" * 10_000,
    "$" * 10_000,
    "1" * 100_000,
    "1e999999999",
    "1e-999999999",
    "10**99999",
    "((9^{99})^{99})^{99}",
    "10^{999*999*999}",
    "9^(9999*9999)",
    "999999999!",
    r"\binom{1000000000}{500000000}",
    r"\sum_{k=1}^{999999999} k",
    "(x+y+z+w+a+b+c)^{50}",
    "(1+x)^{100}(1+y)^{100}",
    r"(\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11})^{50}",
    "(((a+b)^4+c)^4+d)^4",
    "(a+b)(c+d)(e+f)(g+h)(i+j)(k+l)(m+n)(o+p)(q+r)(s+t)(u+v)(w+x)(y+z)(a-b)(c-d)(e-f)(g-h)",
    "x^{97}+3x^{83}+7x^{11}",
    r"\tan(10^{99})+\sin(10^{99})",
    "+".join(rf"\sqrt{{{n}}}" for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)),
    r"\sqrt{" * 10 + "2" + "}" * 10,
    r"\sin(\sin(\sin(\sin(\cos(\tan(x))))))",
    r"\sqrt{999999999999989}+\log 999999999999877",
    "1/1/" * 100,
    "-" * 139 + "x",
    "\\" * 9_999,
    "\0",
    "\ud800",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: repr(text)[:30])
def test_no_answer_hangs(hostile: str) -> None:
    expressions.math_verify()
    for other in ("1", f"{hostile}+1", "x+1-1"):
        start = time.thread_time()
        assert not same_answer(hostile, other) and not same_answer(other, hostile)
        assert time.thread_time() - start < 15, "two are about 0.7 s"
    start = time.thread_time()
    final_answer(hostile)
    assert time.thread_time() - start < 5


def test_work_is_bounded_where_the_form_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another thread than the main one, and a tracer that was there is there again."""
    assert same_answer("(x+1)^2", "x^2+2x+1")
    monkeypatch.setattr(expressions, "_LINES", 5_000)
    found = []

    def ask() -> None:
        tracer = lambda frame, event, argument: None  # noqa: E731
        sys.settrace(tracer)
        found.append(same_answer("(x+2)^2", "x^2+4x+4"))
        found.append(sys.gettrace() is tracer)
        sys.settrace(None)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_the_bound_holds_where_generators_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is reached at each of a loop's lines; in a generator that is being closed, too."""

    def numbers() -> Iterator[int]:
        yield from (1, 2)

    def first() -> int:
        for number in numbers():
            return number
        return 0

    for lines in range(100, 130):
        monkeypatch.setattr(expressions, "_LINES", lines)
        rounds: list[int] = []

        def ask(rounds: list[int] = rounds) -> bool:
            for _ in range(1_000):
                rounds.append(first())
            return True

        assert not expressions._bounded(ask) and len(rounds) < 50


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} and \boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}, or Answer: 4", r"\{1\}"),
        (r"\boxed{1", ""),
        ("x\n#### 42", "42"),
        ("#### Step 2\nx\ny", ""),
        ("#### 12\n\nAnswer: 5", "5"),
        ("Answer: 1\nlater\nAnswer: 2", "2"),
        ("**Answer:** 5", "5"),
        ("**Answer**: 5.", "5"),
        ("- **Final Answer:** $x^2$", "x^2"),
        ("### Answer\n\n7\n", "7"),
        ("Answer\n4", "4"),
        ("The answer is 3.5. Thus it is done.", "3.5"),
        ("so the final answer is **12**", "12"),
        ("The answer is 5; it fits.", "5"),
        ("I answered: 3", ""),
        ("Answers: 3", ""),
        ("", ""),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        (["1/2", "3", "0.5", ""], [True, False, True, False]),
        (["1", "2"], [False, False]),
        (["1", "2", "2.0", "1.0", "3"], [False] * 5),
        (["7"], [True]),
        (["", ""], [False, False]),
        ([], []),
    ],
)
def test_votes(answers: list[str], kept: list[bool]) -> None:
    assert majority(answers) == kept


# --------------------------------------------------------------------------------- near-duplicates


def words(number: int, count: int = 200) -> list[str]:
    draw = random.Random(number)
    return [f"w{draw.randrange(5_000)}" for _ in range(count)]


def test_near_duplicates() -> None:
    texts = SeenTexts(NearDuplicates())
    first = words(1)
    assert texts.seen(" ".join(first), "a") == ""
    assert texts.seen(" ".join(words(2)), "b") == ""
    changed = [*first[:100], "other", *first[101:]]  # shares 191 of 201 n-grams
    assert texts.seen(" ".join(changed).upper(), "c") == "a"
    half = [*first[:100], *words(3, 100)]
    assert texts.seen(" ".join(half), "d") == "", "a half that is equal is no near duplicate"
    assert texts.seen(" ".join(half), "e") == "d"


def test_the_likest_is_named() -> None:
    first = words(1)
    a = ("a", " ".join([*first[:150], *words(3, 100)]))
    b = ("b", " ".join([*words(5, 100), *first[90:], *words(4, 20)]))
    for one, other in ((a, b), (b, a)):
        texts = SeenTexts(NearDuplicates(threshold=0.25))
        assert texts.seen(one[1], one[0]) == "" and texts.seen(other[1], other[0]) == ""
        assert texts.seen(" ".join(first), "c") == "a"


def test_most_near_duplicates_are_found() -> None:
    texts = SeenTexts(NearDuplicates())
    found = 0
    for number in range(60):
        text = words(number)
        assert texts.seen(" ".join(text), str(number)) == ""
        text[50] = text[150] = "other"  # Jaccard similarity 0.9
        found += texts.seen(" ".join(text), "again") == str(number)
    assert found >= 57


def test_short_texts_are_compared_whole() -> None:
    texts = SeenTexts(NearDuplicates())
    assert texts.seen("What is 2 + 2?", "a") == ""
    assert texts.seen("What is 2 - 2?", "b") == ""
    assert texts.seen("what is  2 + 2?\n", "c") == "a"


# --------------------------------------------------------------------------------------- test sets

QUESTION = "A farmer has seventeen sheep and buys twice as many goats on a rainy Monday in May"


def held_out(folder: Path, *records: Any, ngram: int = 13) -> HeldOut:
    (folder / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return HeldOut(Decontamination(files=["test.jsonl"], ngram=ngram), folder)


def test_what_shares_words_with_a_test_set(tmp_path: Path) -> None:
    nested = {"messages": [{"role": "user", "content": QUESTION}], "answer": "51", "kind": ["b c"]}
    check = held_out(tmp_path, {"question": "Something else"}, nested)
    assert check.found("So: " + QUESTION.replace(" and", ", AND").upper() + "? 51") == (
        "test.jsonl record 2 shares: 'a farmer has seventeen sheep and buys twice as many goats on a'"
    )
    assert check.found(" ".join(QUESTION.split()[:12])) == ""
    assert check.found("user 51 b c Something else") == ""
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress((tmp_path / "test.jsonl").read_bytes()))
    packed = HeldOut(Decontamination(files=["test.jsonl.gz"]), tmp_path)
    assert packed.found(QUESTION).startswith("test.jsonl.gz record 2 shares")


def test_short_texts_of_a_test_set_are_whole_parts(tmp_path: Path) -> None:
    check = held_out(tmp_path, {"question": "What is\n2 + 2?", "answer": "four", "id": "test/7"})
    assert check.found("Think.\n\nWhat is 2 + 2?\nIt is 4.").startswith(
        "test.jsonl record 1 shares"
    )
    assert check.found("Hi.\n\nWhat is\n2 + 2?\n\n4") == "test.jsonl record 1 shares: 'what is 2 2'"
    assert check.found("Say what is 2 + 2 + 3") == "" and check.found("four") == ""


def test_bad_test_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        HeldOut(Decontamination(files=["none.jsonl"]), tmp_path)
    with pytest.raises(UserError, match=r"test.jsonl: has no text of 3 words or more"):
        held_out(tmp_path, {"answer": "four"})
    (tmp_path / "test.jsonl").write_text('{"a": "one two three"}\n[1]\n')
    with pytest.raises(UserError, match=r"test.jsonl, record 2: the record is not an object"):
        HeldOut(Decontamination(files=["test.jsonl"]), tmp_path)


# ----------------------------------------------------------------------------------------- together


def test_checks_in_their_order(tmp_path: Path) -> None:
    held_out(tmp_path, {"question": QUESTION})
    checks = open_checks(Checks(held_out=Decontamination(files=["test.jsonl"])), tmp_path)

    def row(question: str) -> dict[str, Any]:
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": "I see."}]
        return {"messages": said, "answer": "1"}

    assert checks.reject(row(QUESTION), "a")[0] == "in a test set"
    assert checks.reject(row(QUESTION), "b")[0] == "in a test set", "a refused row is not kept"
    assert checks.reject(row("What else is there to be said?"), "c") == ("", "")
    assert checks.reject(row("What else is there to be said?"), "d") == ("near duplicate", "of c")
    assert checks.reject({"text": "def f(): return 1"}, "e") == ("", "")
    assert row_text(row("Q")) == "Q\n\nI see."


def test_checks_that_are_off(tmp_path: Path) -> None:
    checks = open_checks(Checks().model_copy(update={"near_duplicates": None}), tmp_path)
    assert [checks.reject({"text": "a b"}, id) for id in "ab"] == [("", "")] * 2


def test_libraries_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def importing(name: str, *rest: Any) -> Any:
        if name in ("datasketch", "math_verify"):
            raise ImportError(name)
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(UserError, match=r"needs datasketch; pip install 'megacode\[synthesis\]'"):
        open_checks(Checks(), tmp_path)
    expressions.math_verify.cache_clear()
    try:
        assert same_answer("1/2", "0.5"), "numbers need no library"
        with pytest.raises(UserError, match=r"needs math_verify; pip install 'megacode\[synth"):
            same_answer("x+1", "1+x")
        with pytest.raises(UserError, match="math_verify"):
            open_checks(Checks(majority=True), tmp_path)
    finally:
        expressions.math_verify.cache_clear()
