"""The languages of code pairs, each with its tree-sitter grammar."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from megacode.errors import UserError

if TYPE_CHECKING:
    import tree_sitter


@dataclass(frozen=True)
class Language:
    """A language whose functions are cut out and rewritten.

    Attributes:
        endings: of its files, with the dot.
        grammar: the module that holds its grammar, and the function there that gives it.
        functions: a tree-sitter query; it captures each function as @function.
        scopes: the file in `scopes/` that says which names are bound where.
        kept: names with a meaning of their own, which are never renamed.
        unsafe: outside names, and attributes with their dot, that read local names as text.
        positional: a name is bound from its declaration on, not in its whole scope.
        in_class: methods parse only inside `class A { }`.
    """

    name: str
    endings: tuple[str, ...]
    grammar: tuple[str, str]
    functions: str
    scopes: str
    kept: frozenset[str] = frozenset()
    unsafe: frozenset[str] = frozenset()
    positional: bool = False
    in_class: bool = False


_JS_FUNCTIONS = """
[(function_declaration) (generator_function_declaration) (method_definition)] @function
(lexical_declaration
  . (variable_declarator value: [(arrow_function) (function_expression)]) .) @function
"""
_DEFINITIONS = "(function_definition) @function"

_ALL = (
    Language(
        "python",
        (".py", ".pyi"),
        ("tree_sitter_python", "language"),
        f"{_DEFINITIONS} (decorated_definition (function_definition)) @function",
        "python",
        frozenset("self cls mcs _".split()),
        frozenset(
            "locals vars eval exec globals dir "
            "._getframe .currentframe .f_locals .f_back .co_varnames .func_code".split()
        ),
    ),
    Language(
        "javascript",
        (".js", ".mjs", ".cjs", ".jsx"),
        ("tree_sitter_javascript", "language"),
        _JS_FUNCTIONS,
        "javascript",
        frozenset("constructor arguments undefined _".split()),
        frozenset(["eval"]),
        in_class=True,
    ),
    Language(
        "typescript",
        (".ts", ".mts", ".cts", ".tsx"),
        ("tree_sitter_typescript", "language_tsx"),
        _JS_FUNCTIONS,
        "typescript",
        frozenset("constructor arguments undefined _".split()),
        frozenset(["eval"]),
        in_class=True,
    ),
    Language(
        "java",
        (".java",),
        ("tree_sitter_java", "language"),
        "[(method_declaration body: (_)) (constructor_declaration)] @function",
        "java",
        frozenset(["main", "_"]),
        positional=True,
        in_class=True,
    ),
    Language(
        "c",
        (".c", ".h"),
        ("tree_sitter_c", "language"),
        _DEFINITIONS,
        "c",
        frozenset(["main"]),
        positional=True,
    ),
    Language(
        "cpp",
        (".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx"),
        ("tree_sitter_cpp", "language"),
        f"{_DEFINITIONS} (template_declaration (function_definition)) @function",
        "cpp",
        frozenset(["main", "_"]),
        positional=True,
    ),
    Language(
        "go",
        (".go",),
        ("tree_sitter_go", "language"),
        "[(function_declaration body: (_)) (method_declaration body: (_))] @function",
        "go",
        frozenset(["main", "init", "_"]),
        positional=True,
    ),
    Language(
        "rust",
        (".rs",),
        ("tree_sitter_rust", "language"),
        "(function_item) @function",
        "rust",
        frozenset(["main"]),
        positional=True,
    ),
)
LANGUAGES: dict[str, Language] = {language.name: language for language in _ALL}
_BY_ENDING = {ending: language for language in _ALL for ending in language.endings}


def language_of(path: str) -> Language | None:
    """The language of a file by its ending, or None."""
    return _BY_ENDING.get(PurePath(path).suffix.lower())


def parse(source: bytes, language: Language) -> tree_sitter.Tree:
    """The syntax tree of UTF-8 text; where the text is wrong it holds error nodes.

    UserError if the grammar is not installed.
    """
    return _parser(language).parse(source)


@cache
def query(language: Language, text: str) -> tree_sitter.Query:
    """A compiled query over the language's trees."""
    import tree_sitter

    return tree_sitter.Query(_grammar(language), text)


@cache
def scopes_query(language: Language) -> tree_sitter.Query:
    """The query of the language's file in `scopes/`, with the files that it includes."""
    return query(language, _read(language.scopes))


def _read(name: str) -> str:
    text = (Path(__file__).parent / "scopes" / f"{name}.scm").read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    included = first.removeprefix("; inherits: ")
    return _read(included) + rest if included != first else text


@cache
def _parser(language: Language) -> tree_sitter.Parser:
    grammar = _grammar(language)
    import tree_sitter

    return tree_sitter.Parser(grammar)


@cache
def _grammar(language: Language) -> tree_sitter.Language:
    module, function = language.grammar
    try:
        import tree_sitter

        return tree_sitter.Language(getattr(importlib.import_module(module), function)())
    except ImportError:
        raise UserError(
            f"{language.name} functions need the package {module.replace('_', '-')}: "
            "pip install 'megacode[pairs]'"
        ) from None
