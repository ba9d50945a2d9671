"""Paragraphs of prose out of docstrings, reference pages and package descriptions."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings

_TRIPLE_QUOTED = re.compile(r'"""(.*?)"""', re.S)
_FIELD = re.compile(
    r"^[ \t]*([:@]\w+|[\w.*, ]{1,40} ?: |[-*+] +``?\w+``? ?:|\.\. |\w+\(.*\)|#|\||```)"
)
_HEADING = re.compile(r"^.*\n[ \t]*[-=~^]{3,}[ \t]*$", re.M)
_ENDS = (".", "!", "?", ":", ")", '"', "`", "'")


def paragraphs(text: str) -> list[str]:
    """The prose among the paragraphs of a page: whole sentences, not code, tables, headings or lists of parameters.

    A paragraph keeps its line breaks and loses its common indentation.
    """
    blocks = re.split(r"\n[ \t]*\n", _HEADING.sub("", text.replace("\r\n", "\n")))
    return [
        block
        for block in (textwrap.dedent(b.strip("\n")).rstrip() for b in blocks)
        if _is_prose(block)
    ]


def _is_prose(block: str) -> bool:
    if len(block) < 60 or len(block.split()) < 10 or not block.endswith(_ENDS) or ">>>" in block:
        return False
    lines = block.split("\n")
    if any(map(_FIELD.match, lines)) or any(line.startswith("  ") for line in lines):
        return False
    plain = sum(c.isalpha() or c in " ,.\n" for c in block)
    return plain >= 0.88 * len(block) and max(map(len, block.split())) <= 60


def docstring_prose(source: str) -> list[str]:
    """Prose of the docstrings of a Python file, in their order; [] for a file that has little or does not parse."""
    # Parsing is slow (about 5 MB/s): only where quotes promise at least a seventh of the file.
    quoted = sum(map(len, _TRIPLE_QUOTED.findall(source)))
    if quoted < 1000 or 7 * quoted < len(source):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: list[str] = []
    for node in _with_docstrings(tree):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            found += _unindented(inspect.cleandoc(docstring))
    return found


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _with_docstrings(node: _Documented) -> list[_Documented]:
    """The module, its classes and functions and theirs, in the order of the file."""
    found: list[_Documented] = [node]
    for child in node.body:
        if isinstance(child, _Documented):
            found += _with_docstrings(child)
    return found


def _unindented(docstring: str) -> list[str]:
    """Prose paragraphs that stand at the docstring's own margin: indented ones are code or belong to a parameter."""
    margin = [
        block for block in re.split(r"\n[ \t]*\n", docstring) if not block.startswith((" ", "\t"))
    ]
    return paragraphs("\n\n".join(margin))


def package_description(metadata: str) -> list[str]:
    """Prose of a package's description: the body of its METADATA, after the headers."""
    _, _, body = metadata.partition("\n\n")
    return paragraphs(body)
