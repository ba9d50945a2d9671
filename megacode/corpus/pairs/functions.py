"""The functions of a file, and the tokens of a function."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from megacode.corpus.pairs.languages import LANGUAGES, Language, parse, query

if TYPE_CHECKING:
    import tree_sitter

Kind = Literal["name", "keyword", "operator", "number", "string", "comment", "other"]

_WHOLE: dict[str, Kind] = {
    **dict.fromkeys(("comment", "line_comment", "block_comment", "html_comment"), "comment"),
    **dict.fromkeys(("string", "template_string", "string_literal", "char_literal"), "string"),
    **dict.fromkeys(("raw_string_literal", "interpreted_string_literal"), "string"),
    **dict.fromkeys(("character_literal", "rune_literal", "regex", "jsx_text"), "string"),
}
"""Kinds of the nodes that are one token, whatever is in them."""
_PUNCTUATION = frozenset("( ) [ ] { } , ; : . @ -> => :: ?. ...".split())
_COMMENTS = re.compile(rb"(?:^[ \t]*#[^\"'\\\n]*\n){50,}", re.M)
"""Runs of lines that are comments in Python, or within a string and do not end it. The grammar's
time grows with the square of their number, so they are read as blank lines."""
_CLASS_START, _CLASS_END = b"class A {\n", b"\n}"


@dataclass(frozen=True)
class Function:
    """A function or method of a file.

    Attributes:
        text: its source without the indentation of its first line, decorators included.
        number: its position among the functions taken from the file, from 0.
        first_line: in the file, from 1.
    """

    language: str
    name: str
    text: str
    number: int
    first_line: int


@dataclass(frozen=True)
class Leaf:
    """A token; `start` and `end` are offsets in characters."""

    text: str
    start: int
    end: int
    kind: Kind


def functions_of(source: str, language: str) -> list[Function]:
    """The outermost functions and methods of a file in file order; nested ones stay in them.

    Functions with syntax errors are left out, and so are those without a body. The time is linear
    in the source's length. UserError if the language's grammar is not installed.
    """
    from tree_sitter import QueryCursor

    spoken = LANGUAGES[language]
    data = source.encode("utf-8", "replace")
    read = _COMMENTS.sub(_blank, data) if language == "python" else data
    captures = QueryCursor(query(spoken, spoken.functions)).captures(parse(read, spoken).root_node)
    functions: list[Function] = []
    end = 0
    for node in sorted(captures.get("function", ()), key=lambda n: (n.start_byte, -n.end_byte)):
        if node.start_byte < end:
            continue
        end = node.end_byte
        if not node.has_error:
            first = _with_decorators(node)
            name = _name_node(node)
            functions.append(
                Function(
                    language,
                    _decoded(name.text or b"") if name else "",
                    _dedented(data, first.start_byte, end),
                    len(functions),
                    first.start_point[0] + 1,
                )
            )
    return functions


@lru_cache(maxsize=16)
def leaves(text: str, language: str) -> tuple[Leaf, ...]:
    """The tokens of a function in order; comments and strings are whole, f-strings too.

    Text between two tokens is white space, or what the grammar could not read. Every kind of
    candidate asks for its query's.
    """
    data = text.encode("utf-8", "replace")
    root, shift = function_tree(data, LANGUAGES[language])
    offsets = range(len(data) + 1) if text.isascii() else _character_offsets(data)
    found = []
    cursor = root.walk()
    while True:
        node = cursor.node
        assert node is not None
        kind = _WHOLE.get(node.type)
        if kind is None and cursor.goto_first_child():
            continue
        start, end = node.start_byte - shift, node.end_byte - shift
        if 0 <= start < end <= len(data):
            piece = data[start:end].decode()
            if not piece.isspace():
                found.append(Leaf(piece, offsets[start], offsets[end], kind or _kind(node, piece)))
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return tuple(found)


def _blank(found: re.Match[bytes]) -> bytes:
    """As many bytes and lines without text."""
    return re.sub(rb"[^\n]", b" ", found[0])


def function_tree(data: bytes, language: Language) -> tuple[tree_sitter.Node, int]:
    """The node that holds a function's text, and the offset of the text's first byte in its tree.

    A method that means nothing outside a class is parsed in one.
    """
    root = parse(data, language).root_node
    if language.in_class:
        outside = root.named_children[:1]
        if root.has_error or (outside and outside[0].type == "expression_statement"):
            wrapped = parse(_CLASS_START + data + _CLASS_END, language).root_node
            if not wrapped.has_error:
                body = wrapped.named_children[0].child_by_field_name("body")
                if body is not None:
                    return body, len(_CLASS_START)
    return root, 0


def _kind(node: tree_sitter.Node, text: str) -> Kind:
    if "identifier" in node.type or node.type in ("label_name", "metavariable"):
        return "name"
    if text[0].isdigit() or (text[0] == "." and text[1:2].isdigit()):
        return "number"
    if text[0].isalpha() or text[0] == "_":
        return "keyword"
    return "other" if node.is_named or text in _PUNCTUATION else "operator"


def _with_decorators(node: tree_sitter.Node) -> tree_sitter.Node:
    """The first of the decorators that TypeScript puts beside a method, or the node."""
    if node.type == "method_definition":
        while (before := node.prev_sibling) is not None and before.type == "decorator":
            node = before
    return node


def _name_node(node: tree_sitter.Node | None) -> tree_sitter.Node | None:
    """Follows declarations and declarators down to the function's name."""
    while node is not None and node.child_count:
        for field in ("name", "declarator", "definition"):
            if (child := node.child_by_field_name(field)) is not None:
                break
        else:
            if "declarat" not in node.type:
                break
            child = node.named_children[-1]
        node = child
    return node


def _dedented(data: bytes, start: int, end: int) -> str:
    """Text of [start, end) without the first line's indentation, where a line begins with it."""
    line = data.rfind(b"\n", 0, start) + 1
    before = data[line:start]
    indent = before[: len(before) - len(before.lstrip())]
    text = data[start:end]
    return _decoded(text.replace(b"\n" + indent, b"\n") if indent else text)


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _character_offsets(data: bytes) -> list[int]:
    """The number of characters that begin before each byte; one entry more than bytes."""
    return [0, *accumulate((byte & 0xC0) != 0x80 for byte in data)]
