"""Paragraphs of prose out of docstrings, reference pages and package descriptions."""

from __future__ import annotations

import ast
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
    """The paragraphs of a page that are prose: not code, tables, headings, lists of parameters.

    A paragraph keeps its line breaks and loses its common indentation.
    """
    blocks = re.split(r"\n[ \t]*\n", _HEADING.sub("", text.replace("\r\n", "\n")))
    return list(
        filter(_is_prose, (textwrap.dedent(block.strip("\n")).rstrip() for block in blocks))
    )


def _is_prose(block: str) -> bool:
    if len(block) < 60 or len(block.split()) < 10 or not block.endswith(_ENDS) or ">>>" in block:
        return False
    lines = block.split("\n")
    if any(map(_FIELD.match, lines)) or any(line.startswith("  ") for line in lines):
        return False
    plain = sum(c.isalpha() or c in " ,.\n" for c in block)
    return plain >= 0.88 * len(block) and max(map(len, block.split())) <= 60


def docstring_prose(source: str) -> list[str]:
    """Prose paragraphs of the docstrings of a Python file, in their order.

    Returns [] for a file that has little prose or does not parse.
    """
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
        blocks = re.split(r"\n[ \t]*\n", ast.get_docstring(node) or "")
        # At the docstring's own margin: indented paragraphs are code or belong to a parameter.
        margin = [block for block in blocks if not block.startswith((" ", "\t"))]
        found += paragraphs("\n\n".join(margin))
    return found


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _with_docstrings(node: _Documented) -> list[_Documented]:
    """The module, its classes and functions and theirs, in the order of the file."""
    found: list[_Documented] = [node]
    for child in node.body:
        if isinstance(child, _Documented):
            found += _with_docstrings(child)
    return found
