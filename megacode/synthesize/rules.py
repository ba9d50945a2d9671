"""The schema of an operator's file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megacode.recipe.section import Section
from megacode.synthesize.templates import FUNCTIONS

PARTS = ("text", "body")
"""What every reply has."""
_NAME = r"^[a-z][a-z0-9_]*$"


class Read(Section):
    """How a reply is read."""

    tag: list[str] = Field(default=[])
    """Its first line is one of these."""
    sections: list[str] = Field(default=[])
    """Headings it has; `two_words` stands for `Two words`."""

    @field_validator("sections")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not name.isidentifier() or name != name.lower() or name in (*PARTS, "tag"):
                raise ValueError(
                    f"{name!r} cannot be a section's name; take a lower-case word (two_words) "
                    "other than text, body and tag"
                )
        return value


class Step(Section):
    """One request."""

    name: str = Field(pattern=_NAME)
    of: str
    """The model's role."""
    system: str = ""
    prompt: str
    read: Read = Read()
    may_be_cut: bool = False
    """A reply that `max_tokens` cut off is used as it is; otherwise the candidate is rejected."""
    when: str = ""
    """An expression; the step is left out where it is false."""

    @field_validator("name")
    @classmethod
    def _free(cls, value: str) -> str:
        if value in FUNCTIONS or value == "sample":
            raise ValueError(f"{value!r} means something else in templates; take another name")
        return value


class Message(Section):
    """A message of a row."""

    role: Literal["system", "user", "assistant"]
    content: str


class Row(Section):
    """What is made of a record and the replies."""

    messages: list[Message] = Field(default=[])
    text: str = ""
    answer: str = ""
    """What votes and comparisons look at."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Row:
        if bool(self.messages) == bool(self.text):
            raise ValueError("has one of `messages:` and `text:`")
        return self


class Rules(Section):
    """The whole file."""

    description: str = ""
    needs: list[str] = Field(min_length=1)
    """Fields without which a record is passed over."""
    samples: int = Field(default=1, ge=1)
    ask: list[Step] = Field(min_length=1)
    reject: dict[str, str] = Field(default={})
    """Reason -> expression. In order; a rule is looked at as soon as its steps are done."""
    record: Row

    @model_validator(mode="after")
    def _different_names(self) -> Rules:
        names = [*self.needs, *(step.name for step in self.ask)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two things are named {name}; fields and steps share their names")
            if name in FUNCTIONS or name == "sample":
                raise ValueError(f"`needs` has {name}, which means something else in templates")
        return self
