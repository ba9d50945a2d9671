"""Jinja as transformers sets it for chat templates: a sandbox, since a template is data.

The settings: `trim_blocks`, `lstrip_blocks`, loop controls, the `generation` tag, `tojson` without
escapes of HTML, `raise_exception` and `strftime_now`.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """`marks`: put around `generation` blocks. `blocks`: how many were rendered."""

    marks: tuple[str, str] = ("", "")
    blocks = 0

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        for name in ("lipsum", "cycler", "joiner"):  # no template needs them
            del self.globals[name]
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        start, end = self.environment.marks  # type: ignore[attr-defined]
        self.environment.blocks += 1  # type: ignore[attr-defined]
        return f"{start}{caller()}{end}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
