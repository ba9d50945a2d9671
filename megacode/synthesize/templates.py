"""Jinja of an operator: prompts, rules and rows, in the sandbox of chat templates.

The same record and replies give the same text: what depends on the time or on chance is not there.
A name that is not defined is an error, and so is one that cannot be, before anything is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from megacode.errors import UserError
from megacode.recipe.compose import did_you_mean
from megacode.synthesize.answers import final_answer, same_answer
from megacode.synthesize.reading import fenced
from megacode.tokenizer.chat_environment import ChatEnvironment


def steps(text: str) -> list[str]:
    """The lines of a text that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "same_answer": same_answer,
    "final_answer": final_answer,
    "steps": steps,
    "fenced": fenced,
}


@cache
def _environment() -> ChatEnvironment:
    environment = ChatEnvironment()
    environment.undefined = jinja2.StrictUndefined
    for name in ("strftime_now", "range", "dict", "namespace"):
        environment.globals.pop(name, None)
    del environment.filters["random"]
    return environment


@dataclass(frozen=True)
class Template:
    """A text with Jinja in it, or one expression, and the names it uses.

    `place`: file, line and key, for errors.
    """

    place: str
    value: Callable[[Mapping[str, Any]], Any]
    names: frozenset[str]

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Its value, a text's without blanks around."""
        try:
            return self.value({**values, **FUNCTIONS})
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.place}: fails: {error or type(error).__name__}; correct the template, or "
                "name the field in `needs`"
            ) from None


def compiled(
    source: str,
    place: str,
    fields: Collection[str],
    replies: Mapping[str, Collection[str]],
    later: Collection[str] = (),
    *,
    expression: bool = False,
) -> Template:
    """A template, whose names are known.

    Args:
        fields: what every record has.
        replies: steps that were done before -> what their replies have.
        later: steps that come after.
        expression: `source` is one expression.

    Raises:
        UserError: it is no Jinja, or uses a name that cannot be defined.
    """
    environment = _environment()
    try:
        if expression:
            found = environment.compile_expression(source, undefined_to_none=False)
            tree = environment.parse("{{ " + source + " }}")
        else:
            text = environment.from_string(source)
            tree = environment.parse(source)
        names = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateSyntaxError as error:
        what = "expression" if expression else f"template, in its line {error.lineno},"
        raise UserError(
            f"{place}: is no Jinja {what} that can be read: {error.message}; correct it"
        ) from None
    guarded = set(_guarded(tree))
    known = {*fields, *replies, "sample", *FUNCTIONS, *environment.globals}
    for name in sorted(names - known - guarded):
        if name in later:
            raise UserError(f"{place}: uses {name}, a step that comes later; use earlier ones")
        raise UserError(
            f"{place}: nothing is named {name}; name a field in `needs`, or ask first whether it "
            f"is there ({name} is defined){did_you_mean(name, sorted(known))}"
        )
    _check_replies(tree, place, replies)
    value: Callable[[Mapping[str, Any]], Any] = (
        (lambda values: _defined(found(values)))
        if expression
        else (lambda values: text.render(values).strip())
    )
    return Template(place, value, frozenset(names))


def _defined(value: Any) -> Any:
    """Raises what an undefined value says when it is used."""
    if isinstance(value, jinja2.Undefined):
        bool(value)
    return value


def _guarded(tree: nodes.Template) -> Iterator[str]:
    """Names that a template asks for before it uses them, or has a default for."""
    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name):
            yield test.node.name
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name in ("default", "d") and isinstance(filtered.node, nodes.Name):
            yield filtered.node.name


def _check_replies(
    tree: nodes.Template, place: str, replies: Mapping[str, Collection[str]]
) -> None:
    """A reply is used by its parts, of which it has some."""
    parts = set()
    for part in tree.find_all(nodes.Getattr):
        if isinstance(part.node, nodes.Name) and part.node.name in replies:
            step, has = part.node.name, replies[part.node.name]
            if part.attr not in has:
                raise UserError(
                    f"{place}: {step}.{part.attr} is nothing that the step {step} reads; there is "
                    + ", ".join(f"{step}.{one}" for one in has)
                )
            parts.add(id(part.node))
    for name in tree.find_all(nodes.Name):
        if name.name in replies and name.ctx == "load" and id(name) not in parts:
            raise UserError(
                f"{place}: {name.name} is a step; write {name.name}.text, or another of its parts"
            )
