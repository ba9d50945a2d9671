"""The functions of files and the tokens of functions, in every language."""

from __future__ import annotations

import sys
import time

import pytest

from megacode.corpus.pairs.functions import Function, functions_of, leaves
from megacode.corpus.pairs.languages import LANGUAGES, language_of
from megacode.errors import UserError

FILES: dict[str, tuple[str, list[tuple[str, int, str]]]] = {
    "python": (
        "import a\n\n@b(1)\n@c\nasync def f(x):\n    def g(): pass\n    return g\n\nclass C:\n\tx = 1\n\n\t@property\n\tdef m(self):\n\t\ts = '''\n\ty'''\n\t\treturn s\nif a:\n  def h(): pass\n",
        [
            ("f", 3, "@b(1)\n@c\nasync def f(x):\n    def g(): pass\n    return g"),
            ("m", 12, "@property\ndef m(self):\n\ts = '''\ny'''\n\treturn s"),
            ("h", 18, "def h(): pass"),
        ],
    ),
    "javascript": (
        "import a from 'b';\nexport function f(x) { return () => x }\nclass C {\n  get m() { return 1 }\n  static async *n(a) {\n    yield a\n  }\n}\nexport const g = (x) => x + 1, h = 2;\nconst k = async x => {\n  await x\n};\nit('t', function () { const q = () => 1; });",
        [
            ("f", 2, "function f(x) { return () => x }"),
            ("m", 4, "get m() { return 1 }"),
            ("n", 5, "static async *n(a) {\n  yield a\n}"),
            ("k", 10, "const k = async x => {\n  await x\n};"),
            ("q", 13, "const q = () => 1;"),
        ],
    ),
    "typescript": (
        "class C<T> {\n  @dec()\n  @dec2\n  private m?(a: T): T { return a }\n  abstract q(): void;\n}\ndeclare function f(a: string): void;\nfunction f(a: any) { return <A>{a}</A> }",
        [("m", 2, "@dec()\n@dec2\nprivate m?(a: T): T { return a }"), ("f", 8, "function f(a: any) { return <A>{a}</A> }")],
    ),
    "java": (
        "class A {\n  A(int a) { }\n  @Override\n  int m(int a) {\n    return a;\n  }\n  abstract int q();\n}\ninterface I { default int d() { return 1; } int e(); }",
        [("A", 2, "A(int a) { }"), ("m", 3, "@Override\nint m(int a) {\n  return a;\n}"), ("d", 9, "default int d() { return 1; }")],
    ),
    "c": (
        "#include <a.h>\nint g(int);\nstatic const char *f(int (*cb)(int))\n{\n\treturn cb(1);\n}\n#ifdef A\nvoid h(void) {}\n#endif\n",
        [("f", 3, "static const char *f(int (*cb)(int))\n{\n\treturn cb(1);\n}"), ("h", 8, "void h(void) {}")],
    ),
    "cpp": (
        "namespace n {\ntemplate <typename T>\nT A<T>::f(T& a) const { return a; }\nclass B { public: B() : x(1) {} ~B() {} int& g() { return x; } int x; };\n}",
        [
            ("f", 2, "template <typename T>\nT A<T>::f(T& a) const { return a; }"),
            ("B", 4, "B() : x(1) {}"),
            ("~B", 4, "~B() {}"),
            ("g", 4, "int& g() { return x; }"),
        ],
    ),
    "go": (
        "package a\n\nfunc f[T any](a T) T {\n\tg := func() {}\n\tg()\n\treturn a\n}\nfunc (r *R) m() {}\nfunc asm(x int)\n",
        [("f", 3, "func f[T any](a T) T {\n\tg := func() {}\n\tg()\n\treturn a\n}"), ("m", 8, "func (r *R) m() {}")],
    ),
    "rust": (
        "mod a {\n    impl A {\n        #[inline]\n        pub fn m(&self) -> u8 {\n            fn n() {}\n            1\n        }\n    }\n}\ntrait T { fn q(); }\nfn f() {}",
        [("m", 4, "pub fn m(&self) -> u8 {\n    fn n() {}\n    1\n}"), ("f", 11, "fn f() {}")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_outermost_functions_in_file_order(language: str) -> None:
    source, expected = FILES[language]
    functions = [Function(language, name, text, number, line) for number, (name, line, text) in enumerate(expected)]  # fmt: skip
    assert functions_of(source, language) == functions


@pytest.mark.parametrize("language", LANGUAGES)
def test_leaves_are_all_of_a_functions_text_but_white_space(language: str) -> None:
    for function in functions_of(FILES[language][0], language):
        end = 0
        for leaf in leaves(function.text, language):
            assert function.text[leaf.start : leaf.end] == leaf.text
            assert function.text[end : leaf.start].isspace() or end == leaf.start
            end = leaf.end
        assert end == len(function.text)


@pytest.mark.parametrize(
    ("language", "text", "kinds"),
    [
        ("python", "def ñ(a):\n  # é\n  return f'é{a!r}' if a is not 0x1f else b.a @ -1.5 # ü", "keyword name other name other other comment keyword string keyword name keyword keyword number keyword name other name other operator number comment"),
        ("javascript", "m() { return `a${b}` ?? /c/.d >= 'e' && this }", "name other other other keyword string operator string other name operator string operator keyword other"),
        ("typescript", "const f = (a?: T) => null;", "keyword name operator other name operator other name other other keyword other"),
        ("java", "A(int a) { b = 'c' + \"d\" + 1L; /* e */ }", "name other keyword name other other name operator string operator string operator number other comment other"),
        ("c", "int f() { return a->b << .5f; }", "keyword name other other other keyword name other name operator number other other"),
        ("cpp", "auto f() { return n::T{nullptr} != R\"(a)\"; }", "keyword name other other other keyword name other name other keyword other operator string other other"),
        ("go", "func f() {\n\ta := `b` &^ 'c'\n\tL: // d\n}", "keyword name other other other name operator string operator string name other comment other"),
        ("rust", "fn f<'a>() -> u8 { x!(\"b\", 'c'); 1..=2 }", "keyword name operator operator name operator other other other keyword other name operator other string other string other other number operator number other"),
    ],
)  # fmt: skip
def test_kinds_of_leaves(language: str, text: str, kinds: str) -> None:
    assert [(leaf.text, leaf.kind) for leaf in leaves(text, language)] == [
        (leaf.text, kind) for leaf, kind in zip(leaves(text, language), kinds.split(), strict=True)
    ]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    "source", ["", "\n", "\0", "}{)(", "\ufffd\ufffd", "\ud800", "x" * 10000, "(" * 2000]
)
def test_odd_sources_have_no_functions(language: str, source: str) -> None:
    assert functions_of(source, language) == []
    leaves(source, language)


def test_functions_with_errors_are_left_out() -> None:
    source = "def f(:\n    pass\n\ndef g():\n    return (\n\ndef h(): pass\n\ndef k(): match x:\n"
    assert {function.name for function in functions_of(source, "python")} <= {"h"}
    source = "def g(): pass\n\n\ndef f(x): return x +\n"
    assert [function.name for function in functions_of(source, "python")] == ["g"]


def test_line_ends_and_tabs_stay() -> None:
    source = "class A:\r\n\tdef f(self):\r\n\t\treturn 1\r\n"
    assert functions_of(source, "python")[0].text == "def f(self):\r\n\treturn 1"


def test_a_long_file_takes_time_in_proportion() -> None:
    seconds = []
    for functions in (3_000, 30_000):
        source = "".join(f"class A{i}:\n    def f(self):\n        return {i}\n\n" for i in range(functions))  # fmt: skip
        started = time.process_time()
        assert len(functions_of(source, "python")) == functions
        seconds.append(time.process_time() - started)
    assert seconds[1] < 30 * seconds[0]


def test_languages_by_ending() -> None:
    endings = {
        "a/b.PY": "python",
        "c.tsx": "typescript",
        "d.h": "c",
        "e.hpp": "cpp",
        "f.rs": "rust",
    }
    for path, name in endings.items():
        language = language_of(path)
        assert language is not None and language.name == name
    assert language_of("py") is None and language_of("a.md") is None


def test_a_grammar_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megacode.corpus.pairs import languages

    languages._parser.cache_clear()
    languages._grammar.cache_clear()
    languages.query.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter_go", None)
    with pytest.raises(UserError, match=r"go functions need the package tree-sitter-go: pip install 'megacode\[pairs\]'"):  # fmt: skip
        functions_of("package a", "go")


def test_many_lines_of_comments_are_read_in_linear_time() -> None:
    comments = "    # a line\n" * 20_000
    source = f"def first(a):\n{comments}    return a\n\n\ndef second(b):\n    return b\n"
    first, second = functions_of(source, "python")
    assert first.text.count("# a line") == 20_000 and second.text == "def second(b):\n    return b"
