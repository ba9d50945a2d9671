"""Other names for a function's own names, by the scopes of its language.

`scopes/LANGUAGE.scm` are tree-sitter queries. They capture

- ranges: `function`, `block` and `class` are scopes. `outer` is evaluated in the scope around the
  one it is written in: a default value, an annotation, the first iterable of a comprehension. Every
  word of `frozen` keeps its name, and every `{word` of `format`. `unsafe` code can read names as
  text. Names bound in `late` exist from the end of the statement around it.
- every `word` that can name a variable, and `typeword`s, which only name types;
- where a word is bound: `var` in its scope, `hoist` in its function, `type` as a type in its scope,
  `name` and `typename` in the scope around the definition that they name, `param` like `var`;
  `pattern` like `var` unless capitalized; `leaf` of a destructuring by what is around that. `method`
  marks names of functions that callers find through an object; `label`s have names of their own;
- `shorthand`, which names a field and a variable at once;
- what is no variable: `keep` stays. `fixed` stays wherever else the word occurs. `use` takes back
  that a word is bound. `call` is a variable only if it is the function's own name; `keyword` is the
  name of a keyword argument and `splatted` a function called with `**`.

A name is renamed if every place where it names a variable finds a binding in the function. It
is renamed in all of them at once, so that shadowing stays what it was.
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
"""No f, i and u, whose numbers are Rust's types; no j and y, C's functions; no l and o, digits to the eye."""


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
    """A function with other names for its parameters, variables, nested functions, labels and itself.

    Callers who pass a parameter of the function by keyword would have to change; parameters that
    the text itself passes by keyword stay. A method's name stays if the text mentions it again.
    Imports, globals, builtins, attributes, fields, keywords, strings and comments stay too, and what a
    name may mean is decided for staying where the text alone does not say it.

    None if nothing can be renamed, the text does not parse, or code in it can read names as text.
    The same (text, key) gives the same result, and renaming the result again changes nothing.
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
    places = [
        word for word in words if word.mark not in ("keep", "keyword") and word.text not in fixed
    ]
    names = dict.fromkeys(word.text for word in places)
    if not names:
        return None
    taken = {word for word in re.findall(r"[\w$]+", text) if word not in names}
    new = dict(zip(names, _fresh_names(key, taken)))
    shorthand = {node.start_byte for node in captures.get("shorthand", ())}
    pieces, end = [], shift
    for word in places:
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
    late = sorted((n.start_byte, n.end_byte, _end(n.parent)) for n in captures.get("late", ()))
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
        fixed.update(re.findall(r"[\w$]+", source[node.start_byte : node.end_byte].decode()))
    for node in _nodes(captures, "format"):
        fixed.update(
            re.findall(r"(?<!\{)\{(?:\{\{)*(\w+)", source[node.start_byte : node.end_byte].decode())
        )
    own = _own_name(captures)
    own_text = own.text.decode() if own is not None and own.text else ""
    if own_text in re.findall(r"(?:\.|->|::)\s*([\w$]+)", source.decode()):
        fixed.add(own_text)
    return fixed | _passed_by_keyword(words, captures, own_text) | language.kept


def _is_bound(word: _Word) -> bool:
    """Whether the word finds a binding in the function. A decorator of the function itself finds none."""
    scope: _Scope | None = word.scope
    while scope is not None and scope.kind != "module":
        bound_from = scope.values.get(word.text)
        if word.text in scope.types or (
            not word.is_type and bound_from is not None and bound_from <= word.start
        ):
            return True
        if scope.kind == "outer" and scope.above is not None:
            scope = scope.above
            if word.text in scope.types:
                return True
        scope = scope.above
    if scope is None or word.scope is scope:
        return False
    return word.text in scope.types or (not word.is_type and word.text in scope.values)


def _passed_by_keyword(words: list[_Word], captures: Captures, own: str) -> set[str]:
    """Parameters that a call in the text may name: of nested functions, and of one that calls itself."""
    keywords = {word.text for word in words if word.mark == "keyword"}
    functions = {word.text for word in words if word.mark == "name"}
    splatted = {node.text.decode() for node in _nodes(captures, "splatted") if node.text}
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
    random_state, used = random.Random(key), set(taken)
    for drawn in count():
        # More digits where most names of a length may be used up.
        numbers = 90 * 10 ** len(str(drawn // 500)) // 10
        letter = _LETTERS[int(random_state.random() * len(_LETTERS))]
        name = f"{letter}{numbers // 9 + int(random_state.random() * numbers)}"
        if name not in used:
            used.add(name)
            yield name


def _own_name(captures: Captures) -> tree_sitter.Node | None:
    """The name of the outermost function; it comes before those of nested ones."""
    return min(_nodes(captures, "name", "method"), key=_start, default=None)


def _nodes(captures: Captures, *kinds: str) -> Iterator[tree_sitter.Node]:
    return (node for kind in kinds for node in captures.get(kind, ()))


def _start(node: tree_sitter.Node) -> int:
    return node.start_byte


def _end(node: tree_sitter.Node | None) -> int:
    return node.end_byte if node is not None else 0
