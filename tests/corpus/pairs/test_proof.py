"""What proofs by running see: values, errors, prints, changed arguments; and what they survive."""

from __future__ import annotations

import pytest

from megacode.corpus.pairs.proof import Trial, Verdict, prove

GENERATOR = """
def numbers(rng):
    return [rng.randint(-9, 9) for _ in range(5)]

def inputs(rng: Random):
    return {"s": numbers(rng), "n": rng.randint(0, 3)}
"""
PROGRAM = "import math\n\ndef helper(x):\n    return x + 1\n\ndef f(s, n=2):\n    s.append(n)\n    return [helper(t) for t in s if t]"
AGREES = {
    "renamed": "def help2(y):\n    return y + 1\n\ndef g(q, m=2):\n    q.append(m)\n    return [help2(t) for t in q if t]",
    "a loop": "def f(s, n=2):\n    s.append(n)\n    out = []\n    for t in s:\n        if t:\n            out.append(t + 1)\n    return out",
}  # fmt: skip
DIFFERS = {
    "another value": PROGRAM.replace("+ 1", "+ 2"),
    "sometimes": PROGRAM.replace("if t]", "if t > -9]"),
    "the argument stays": PROGRAM.replace("s.append(n)", "s = [*s, n]"),
    "prints": PROGRAM.replace("    s.append(n)", "    print(n)\n    s.append(n)"),
    "no syntax": "def f(:",
    "no function": "f = 1",
    "another type": PROGRAM.replace("[helper(t) for t in s if t]", "(helper(t) for t in s if t)"),
    "raises": "def f(s, n):\n    raise KeyError",
    "leaves": "import os\ndef f(s, n):\n    os._exit(0)",
    "for ever": "def f(s, n):\n    while True:\n        pass",
    "too much memory": "def f(s, n):\n    return bytearray(1 << 40)",
}


def test_what_agrees_and_what_does_not() -> None:
    trial = Trial(PROGRAM, GENERATOR, (*AGREES.values(), *DIFFERS.values()))
    (verdict,) = prove([trial])
    told = dict(zip((*AGREES, *DIFFERS), verdict.agrees, strict=True))
    assert told == dict.fromkeys(AGREES, True) | dict.fromkeys(DIFFERS, False)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1", "has no function to call"),
        ("import no_such_module\ndef f(s, n): pass", "raises ModuleNotFoundError on every input"),
        ("def f(a, b, c): pass", "raises TypeError on every input"),
        ("import os\ndef f(s, n):\n    return os.urandom(8)", "gives other results when it is run again"),
        ("import time\ndef f(s, n):\n    time.sleep(60)", "raises no end on every input"),
    ],
)  # fmt: skip
def test_programs_that_prove_nothing(program: str, reason: str) -> None:
    assert prove([Trial(program, GENERATOR, (program,))]) == [Verdict(reason=reason)]


def test_a_program_that_ends_the_others_is_found_alone() -> None:
    """And sets, whose order differs from one interpreter to the next, are compared as sets."""
    bad = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(s, n): pass"
    sets = "def f(s, n):\n    return {str(t) for t in s}, {'a': {1}}"
    trials = [
        Trial(sets, GENERATOR, (sets,)),
        Trial(bad, GENERATOR, (bad,)),
        Trial(PROGRAM, GENERATOR, ()),
    ]
    first, ended, last = prove(trials)
    assert first == Verdict((True,)) and last == Verdict()
    assert ended.reason == "ends the program that runs it"


@pytest.mark.parametrize("made", ["(1, 2)", "1", "{'b': 2, 'a': 1}", "{'a': 1}", "[1, 2]"])
def test_arguments_in_all_forms(made: str) -> None:
    (verdict,) = prove([Trial("def f(a, b=2):\n    return a, b", f"def g(rng): return {made}", ("def h(x, y=2):\n    return x, y",))])  # fmt: skip
    assert verdict == Verdict((True,))
