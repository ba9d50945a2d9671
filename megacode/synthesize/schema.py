"""A synthesis file: what is read, what is asked of which model, what is accepted."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from megacode.recipe.section import Count, Fraction, Section


class Price(Section):
    """Dollars for a million tokens."""

    input: float = Field(default=0.0, ge=0)
    output: float = Field(default=0.0, ge=0)


class ServedModel(Section):
    """A model behind OpenAI-compatible endpoints, and what it bears."""

    model: str
    """Its name there."""
    endpoints: list[str] = Field(min_length=1)
    """Base addresses, such as http://127.0.0.1:8000/v1; each has the limits below."""
    key: str = ""
    """The environment variable that holds the API key."""
    parameters: dict[str, Any] = Field(default={})
    """Sent with every request as they are: temperature, top_p, max_tokens, seed ..."""
    in_flight: int = Field(default=32, ge=1, le=4096)
    """Requests at a time, at most; 429 lowers it for a while."""
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    timeout_seconds: float = Field(default=600.0, gt=0)
    price: Price = Price()

    @field_validator("endpoints")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        for address in value:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"expected an address such as http://host:8000/v1, not {address!r}"
                )
            if parts.username or parts.password:
                raise ValueError("an address with a password; name a variable in `key` instead")
        return value


class NearDuplicates(Section):
    """Rows that are alike: MinHash of word n-grams, estimated Jaccard similarity."""

    threshold: Fraction = 0.8
    ngram: int = Field(default=5, ge=1)
    permutations: int = Field(default=128, ge=16, le=1024)


class Decontamination(Section):
    """Rows that share a run of words with a test set."""

    files: list[str] = Field(min_length=1)
    """As `inputs`; every text field of a record is looked at."""
    ngram: int = Field(default=13, ge=3)
    """Words; shorter records of a test set are compared whole."""


class Checks(Section):
    """What is looked at beside the operator's own rules."""

    near_duplicates: NearDuplicates | Literal[False] = NearDuplicates()
    """`false` leaves them all in."""
    held_out: Decontamination | None = None
    judge: bool = False
    """`models.judge` reads each row that passed the operator's rules, and accepts or refuses it;
    `prompts` may have a judgement.jinja, in which `{row}` stands for the row."""
    majority: bool = False
    """Of a record's samples only those whose `answer` is that of most (a tie keeps none)."""


class Synthesis(Section):
    """The whole file. Paths are relative to it."""

    name: str
    description: str = ""
    inputs: list[str] = Field(min_length=1)
    """JSONL files of records (.jsonl, .jsonl.gz, .jsonl.zst)."""
    fields: dict[str, str] = Field(default={})
    """What the operator calls a field -> what the inputs call it."""
    operator: str
    """A built-in operator's name, or the path of a file (ends in .yaml)."""
    prompts: str = ""
    """A folder whose files replace the operator's prompts of the same name (STEP.jinja)."""
    output: str
    """A folder."""
    models: dict[str, ServedModel] = Field(min_length=1)
    """By the operator's names: teacher, student, judge ..."""
    samples: int | None = Field(default=None, ge=1)
    """Candidates of each record; the operator's own number if not given."""
    target: Count | None = None
    """Accepted rows to stop at; none: every candidate is made."""
    candidates: Count | None = None
    """Candidates to stop at."""
    checks: Checks = Checks()

    @model_validator(mode="after")
    def _a_name(self) -> Synthesis:
        if not self.name or "/" in self.name:
            raise ValueError("`name` must be a plain word")
        return self
