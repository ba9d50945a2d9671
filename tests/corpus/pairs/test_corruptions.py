"""Corruptions differ as syntax, keep the signature where they say so, and are functions of the key."""

from __future__ import annotations

import pytest

from megacode.corpus.pairs.corruptions import CORRUPTIONS, lines_shuffled, operator_flipped, tokens

FUNCTIONS = {
    "python": '''@cache
def f(a, b: dict[str, int] = {}) -> str:
    """Says
    something."""
    for x in a:
        # of interest
        if x == b and not x:
            return f"{x} + {b!r}"

    async def inner():
        match a:
            case [1, *rest]:
                return rest
    return None
''',
    "javascript": "function f(a) {\n  const b = a.x;\n  let c = b + 1;\n\n  return `${c} + ${b}`;\n}",
    "typescript": "function f(a: {x: number}): number {\n  const b = a.x;\n  let c = b + 1;\n  return c;\n}",
    "java": "public int f(int a) {\n  int b = a;\n  b++;\n  return b;\n}",
    "c": "int f(int a)\n{\n  int b = a + 1;\n  b += 2;\n  return b;\n}",
    "cpp": "int A::f(std::vector<int>& a) {\n  int b = a[0];\n  b = 2;\n  return b + 1;\n}",
    "go": "func (s *S) f(a int) int {\n\tx := a\n\tfor i := 0; i < 3; i++ {\n\t\tx += i\n\t}\n\treturn x\n}",
    "rust": "fn f(a: &mut Vec<i32>) -> i32 {\n    let x = a[0] + 1;\n    if x == 3 {\n        return x;\n    }\n    x\n}",
}


@pytest.mark.parametrize("language", FUNCTIONS)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_differ_in_their_tokens(language: str, kind: str) -> None:
    text = FUNCTIONS[language]
    found = {CORRUPTIONS[kind](text, language, key) for key in range(12)}
    assert len(found) > 1 or kind == "operator-flipped", "the key decides"
    for one in found:
        assert one is not None and tokens(one, language) != tokens(text, language)
    assert CORRUPTIONS[kind](text, language, 5) == CORRUPTIONS[kind](text, language, 5)


@pytest.mark.parametrize("language", FUNCTIONS)
def test_shuffled_lines_are_those_of_the_body(language: str) -> None:
    text = FUNCTIONS[language]
    for key in range(6):
        shuffled = lines_shuffled(text, language, key)
        assert shuffled is not None
        lines = [line for line in text.split("\n") if line.strip()]
        new = [line for line in shuffled.split("\n") if line.strip()]
        assert sorted(new) == sorted(lines) and new != lines
        signature = 2 if language in ("python", "c") else 1
        assert new[:signature] == lines[:signature]
        if language == "python":  # a string of two lines stays one
            assert new.index('    something."""') == new.index('    """Says') + 1
        else:
            assert new[-1] == "}"


@pytest.mark.parametrize(
    "text", ["", "\n\n", "x", "def f(x): return x", "def f():\n    pass", "def f(\n", "\ufffd(", "def f():\n    g()\n    g()"]
)  # fmt: skip
def test_no_lines_to_shuffle(text: str) -> None:
    assert lines_shuffled(text, "python", 1) is None
    for corrupt in CORRUPTIONS.values():
        new = corrupt(text, "python", 1)
        assert new is None or tokens(new, "python") != tokens(text, "python")


def test_an_operator_before_a_symbol() -> None:
    flipped = {operator_flipped("def f(a):\n    return not a", "python", key) for key in range(9)}
    assert flipped == {"def f(a):\n    return a"}
    assert operator_flipped("def f(a):\n    return a", "python", 1) is not None


def test_long_texts() -> None:
    text = "def f(a):\n" + "    a = a + 1\n" * 20_000 + "    return a\n"
    for corrupt in CORRUPTIONS.values():
        assert corrupt(text, "python", 1) is not None
