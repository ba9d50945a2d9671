"""Other names for a function's own names, by the scopes of its language.

A name is renamed where every mention of it as a variable finds its binding in the function. All
mentions get the same new name, so that a name that hides another still does. A name with any other
meaning in the text, or one that the text alone does not settle, stays.

The files `scopes/*.scm` are tree-sitter queries. They capture ranges:

- `function`, `block`, `class`: scopes. What is bound in a class is a member, and stays.
- `outer`: evaluated in the scope around the one it is written in, as a default value is.
- `late`: names bound here are known from the end of the enclosing statement on.
- `frozen`: every name in it stays. `format`: every name after a `{` stays.
- `unsafe`: code that reads names as text; nothing is renamed.

and names:

- `word`: every name that may be a variable's; `typeword`: one that can only be a type's.
- `var`, `param`: bound in the scope around it; `hoist`: in the function; `type`: as a type.
- `name`, `typename`: of a function or class, bound in the scope around its definition.
- `method`: of a function that is called through an object, which binds nothing.
- `pattern`: bound unless capitalized. `leaf`: bound if the pattern around it is not only assigned.
- `use`: not bound, whatever else was captured. `label`: always the function's own.
- `shorthand`: also names a field; `{a}` becomes `{a: new}`.
- `keep`: no variable. `fixed`: no variable, and other mentions stay too.
- `call`: a variable if it is the function's own name. `keyword`: of an argument. `splatted`: of a
  function that is called with `**`.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from megacode.corpus.pairs.functions import function_tree
from megacode.corpus.pairs.languages import LANGUAGES, Language, scopes_query

if TYPE_CHECKING:
    import tree_sitter

    Captures = dict[str, list[tree_sitter.Node]]

_SCOPES = ("outer", "function", "block", "class")
_MARKS = (
    *("var", "pattern", "leaf", "hoist", "param", "type", "name", "typename"),
    *("label", "use", "keep", "call", "keyword", "fixed"),
)
"""Captures of words; a later one replaces an earlier one of the same word."""
_LETTERS = "abcdeghkmnpqrstvwxz"
"""Without f, i, u (f32 is a type of Rust), j, y (j0 is a function of C) and l, o, like digits."""


@dataclass(slots=True, eq=False)
class _Scope:
    """A range of the text; `above` is the range around it."""

    kind: str
    end: int
    above: _Scope | None = None
    values: dict[str, int] = field(default_factory=dict)  # the offset from which each is bound
    types: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Word:
    """An occurrence of a name; `binds` is the scope in which it is bound here, if it is."""

    text: str
    start: int
    end: int
    mark: str
    scope: _Scope
    is_type: bool
    binds: _Scope | None


def renamed(text: str, language: str, key: int) -> str | None:
    """The text of a function with other names for itself and what it defines.

    Renamed: its name, parameters, variables, type parameters, labels, nested functions and classes.
    Kept: imports, globals, builtins, attributes, fields, keyword arguments, strings, comments;
    `self`, `main` and the like; a method's name if the text mentions it again; parameters that the
    text itself passes by keyword. The text is taken alone: a caller elsewhere that passes a
    parameter by keyword would have to change with it.

    None if nothing can be renamed, the text does not parse, or code in it may read names as text.
    The result is a function of (text, key). Renaming it again with the same key changes nothing.
    """
    from tree_sitter import QueryCursor

    spoken = LANGUAGES[language]
    data = text.encode("utf-8", "replace")
    root, shift = function_tree(data, spoken)
    if root.has_error:
        return None
    source = bytes(shift) + data
    captures = QueryCursor(scopes_query(spoken)).captures(root)
    if captures.get("unsafe"):
        return None
    words = _words(captures, source, spoken)
    fixed = _fixed(captures, words, source, spoken)
    kept_words = {"." + word.text for word in words if word.mark == "keep"}
    if not spoken.unsafe.isdisjoint(fixed | kept_words):
        return None
    words = [one for one in words if one.mark not in ("keep", "keyword") and one.text not in fixed]
    names = dict.fromkeys(word.text for word in words)
    if not names:
        return None
    taken = {word for word in re.findall(r"[\w$]+", text) if word not in names}
    new = dict(zip(names, _fresh_names(key, taken), strict=False))
    shorthand = {node.start_byte for node in captures.get("shorthand", ())}
    pieces, end = [], shift
    for word in words:
        pieces.append(source[end : word.start].decode())
        pieces.append(f"{word.text}: " if word.start in shorthand else "")
        pieces.append(new[word.text])
        end = word.end
    return "".join(pieces) + source[end:].decode()


def _words(captures: Captures, source: bytes, language: Language) -> list[_Word]:
    """Every word in order, with its innermost scope. Binds those that are bound."""
    marks = {node.start_byte: mark for mark in _MARKS for node in captures.get(mark, ())}
    own = _own_name(captures)
    methods = {node.start_byte for node in captures.get("method", ())}
    if own is not None and own.start_byte in methods:
        marks[own.start_byte] = "label"  # found through an object: it binds nothing here
    own_text = b"" if own is None else own.text
    nodes = {node.start_byte: node for node in _nodes(captures, "word", "typeword")}
    if own is not None:
        nodes[own.start_byte] = own
    types = {node.start_byte for node in captures.get("typeword", ())}
    late = sorted(
        (node.start_byte, node.end_byte, node.parent.end_byte)
        for node in captures.get("late", ())
        if node.parent is not None
    )
    scope, scopes = _Scope("module", len(source) + 1), _ranges(captures)
    opened, found = 0, []
    for start, node in sorted(nodes.items()):
        end = node.end_byte
        while opened < len(scopes) and scopes[opened][0] <= start:
            begin, minus_end, kind = scopes[opened]
            scope = _Scope(kind, -minus_end, _innermost(scope, begin))
            opened += 1
        scope = _innermost(scope, start)
        mark = marks.get(start, "")
        if mark == "call":
            mark = "" if source[start:end] == own_text else "keep"
        elif mark == "leaf":
            mark = _destructured(node)
        elif mark == "pattern":
            mark = "" if source[start : start + 1].isupper() else "var"
        text, binds = source[start:end].decode(), _binding_scope(mark, scope)
        if binds is not None and mark in ("type", "typename"):
            binds.types.add(text)
        elif binds is not None and not language.positional:
            binds.values[text] = 0
        elif binds is not None:
            before = bisect(late, (start, len(source), 0)) - 1
            within = before >= 0 and start < late[before][1]
            binds.values.setdefault(text, late[before][2] if within else end)
        found.append(_Word(text, start, end, mark, scope, start in types, binds))
    return found


def _ranges(captures: Captures) -> list[tuple[int, int, str]]:
    """(start, -end, kind) of the scopes, each before those within it."""
    nodes = ((kind, node) for kind in _SCOPES for node in captures.get(kind, ()))
    ranges = ((node.start_byte, -node.end_byte, kind) for kind, node in nodes)
    return sorted(ranges, key=lambda one: (one[0], one[1], one[2] != "outer"))


def _innermost(scope: _Scope, offset: int) -> _Scope:
    """The innermost of `scope` and those around it that reaches beyond `offset`."""
    while scope.end <= offset and scope.above is not None:
        scope = scope.above
    return scope


def _binding_scope(mark: str, scope: _Scope) -> _Scope | None:
    """Where a word with this mark in this scope is bound."""
    if mark in ("var", "param", "type"):
        return scope
    if mark in ("name", "typename"):
        return scope.above
    if mark == "hoist":
        while scope.kind in ("block", "outer") and scope.above is not None:
            around = scope.above if scope.kind == "block" else scope.above.above
            assert around is not None, "an outer range lies in a scope"
            scope = around
        return scope
    return None


def _destructured(leaf: tree_sitter.Node) -> str:
    """The mark of a name in a JavaScript pattern: "" if the pattern is only assigned to."""
    holder = leaf.parent
    while holder is not None and holder.type.endswith("pattern"):
        holder = holder.parent
    if holder is None or holder.type == "assignment_expression":
        return ""
    if holder.type == "for_in_statement":
        kind = holder.child_by_field_name("kind")
        return "" if kind is None else "hoist" if kind.type == "var" else "var"
    declaration = holder.parent
    hoisted = declaration is not None and declaration.type == "variable_declaration"
    return "hoist" if hoisted and holder.type == "variable_declarator" else "var"


def _fixed(captures: Captures, words: list[_Word], source: bytes, language: Language) -> set[str]:
    """The names that stay."""
    fixed = set()
    for word in words:
        if word.mark in ("keep", "keyword", "label"):
            continue
        if word.binds is None:
            bound = _is_bound(word)
        else:  # a default value of the function itself may bind a global
            outside = ("class", "module") if word.mark == "hoist" else ("class",)
            bound = word.binds.kind not in outside
        if not bound or word.mark == "fixed" or word.text.startswith("__"):
            fixed.add(word.text)
    for node in _nodes(captures, "frozen"):
        fixed.update(re.findall(r"[\w$]+", _text(node)))
    for node in _nodes(captures, "format"):
        fixed.update(re.findall(r"(?<!\{)\{(?:\{\{)*(\w+)", _text(node)))
    own = _own_name(captures)
    own_text = "" if own is None else _text(own)
    if own_text in re.findall(r"(?:\.|->|::)\s*([\w$]+)", source.decode()):
        fixed.add(own_text)
    return fixed | _passed_by_keyword(words, captures, own_text) | language.kept


def _is_bound(word: _Word) -> bool:
    """Whether the word finds a binding in the function.

    The function's name is one for its body, and none for its decorators and default values.
    """
    scope: _Scope | None = word.scope
    in_body = False
    while scope is not None:
        bound = not word.is_type and scope.values.get(word.text, word.end) <= word.start
        if bound or word.text in scope.types:
            return in_body or scope.kind != "module"
        if scope.kind != "outer":
            in_body = True
        elif scope.above is not None:
            scope = scope.above
            if word.text in scope.types:
                return True
        scope = scope.above
    return False


def _passed_by_keyword(words: list[_Word], captures: Captures, own: str) -> set[str]:
    """Parameters that a call in the text may name, of nested and of recursive functions."""
    keywords = {word.text for word in words if word.mark == "keyword"}
    functions = {word.text for word in words if word.mark == "name"}
    splatted = {_text(node) for node in _nodes(captures, "splatted")}
    calls_itself = sum(word.text == own for word in words) > 1
    return {
        word.text
        for word in words
        if word.mark == "param"
        and (word.text in keywords or splatted & functions)
        and (calls_itself or (word.scope.above is not None and word.scope.above.kind != "module"))
    }


def _fresh_names(key: int, taken: set[str]) -> Iterator[str]:
    """Different short names that are not in `taken`, in an order given by the key."""
    state, used = random.Random(key), set(taken)
    for drawn in count():
        low = 10 ** (1 + drawn // 1000)  # longer names before the short ones are used up
        letter = _LETTERS[int(state.random() * len(_LETTERS))]
        name = f"{letter}{low + int(state.random() * 9 * low)}"
        if name not in used:
            used.add(name)
            yield name


def _own_name(captures: Captures) -> tree_sitter.Node | None:
    """The name of the outermost function, where that is no variable."""
    own = min(_nodes(captures, "name", "method"), key=lambda node: node.start_byte, default=None)
    if own is None:
        return None
    start = own.start_byte
    around = sum(n.start_byte <= start < n.end_byte for n in _nodes(captures, "function", "class"))
    return own if around == 1 else None


def _nodes(captures: Captures, *kinds: str) -> Iterator[tree_sitter.Node]:
    return (node for kind in kinds for node in captures.get(kind, ()))


def _text(node: tree_sitter.Node) -> str:
    return (node.text or b"").decode()
