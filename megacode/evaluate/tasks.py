"""Tasks that a model is scored on: a YAML file that says how, and a JSONL file of items.

    name: brackets
    data: brackets.jsonl              # beside the YAML file
    ranking: {score: label, normalise: none}

An item of a `ranking` task is `{"prompt", "choices", "answer", "continuation"}`: the text of choice
i is prompt + choices[i] + continuation, and the choice whose scored part is the likeliest should be
number `answer`. An item of a `generation` task is `{"prompt", "answer"}`, or `{"prompt", "tests"}`
where what the model writes is run; with a `suffix` the model fills in what stands between the two,
by the recipe's fill-in-the-middle tokens. A `lecs` task's items are the pairs of a file that
`megacode pairs` wrote. Items of the other two may have a `group`, whose accuracy is told apart, and
a `cluster` (a template, a file): items of one cluster are not independent, and intervals say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megacode.corpus.pairs.records import PairRecord, read_pairs
from megacode.errors import UserError
from megacode.files import inside, read_json_lines
from megacode.recipe.load import load_section
from megacode.recipe.schema_objective import Pooling
from megacode.recipe.section import Count, Section

_PROMPT = """{query}

# Does the following code compute the same as the code above?

{candidate}

# Answer, yes or no:"""


class Ranking(Section):
    """Which of an item's choices is the likeliest."""

    preset: Literal["channel"] | None = None
    """`channel` is the score of arXiv 2309.16298: `score: continuation`, `normalise: token`."""
    score: Literal["continuation", "label", "whole"] = "label"
    """What the likelihood is of: the text after the choice given all before it, the choice given
    the prompt, or the whole text."""
    normalise: Literal["token", "byte", "none"] = "none"
    """Divide the log-likelihood by the tokens or the UTF-8 bytes of the text that is scored."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") == "channel":
            return {"score": "continuation", "normalise": "token", **value}
        return value


class Generation(Section):
    """What the model writes after an item's prompt, compared with the answer or run."""

    check: Literal["exact", "run"] = "exact"
    """`exact`: equal to the item's `answer` without blanks around; edit similarity is told, too.
    `run`: prompt + written text + the item's `tests` is a Python program that ends without an
    error, in a sandbox."""
    max_tokens: Count = 64
    stop: list[str] = Field(default=[])
    """The written text ends before the first of these."""
    answer_after: str | None = None
    """`exact` compares what follows the last of these in both texts, such as `####`."""
    samples: Count = 1
    """Texts for each item."""
    k: list[Count] = Field(default=[1])
    """pass@k for these k, from all samples of an item by the unbiased estimator."""
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seconds: float = Field(default=5.0, gt=0)
    """Limit of a program, of CPU time and of wall time."""
    memory_mb: Count = 512
    """Limit of a program's address space."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Generation:
        if not self.k or max(self.k) > self.samples:
            raise ValueError(f"pass@k needs `samples` of at least k: k is {self.k}")
        if self.samples > 1 and not self.temperature:
            raise ValueError("several samples at temperature 0 are all the same; give one")
        return self


class Lecs(Section):
    """Which of two candidates the model holds to be equivalent to the query."""

    score: Literal["embedding", "likelihood", "prompt"] = "embedding"
    """`embedding`: cosine similarity with the query's. `likelihood`: of the candidate after the
    query and an empty line, per token. `prompt`: of the first of `labels` after `prompt`, less that
    of the second."""
    pooling: Pooling = "mean"
    """As of `objective.contrastive`."""
    layer: int | Literal["last"] = "last"
    """As of `objective.contrastive`."""
    prompt: str = _PROMPT
    """Has {query} and {candidate} in it."""
    labels: list[str] = Field(default=[" yes", " no"], min_length=2, max_length=2)
    equivalent: list[str] | None = None
    """Kinds of equivalent candidates that are asked about; default: all in the file."""
    other: list[str] | None = None
    """Kinds of other candidates."""

    @model_validator(mode="after")
    def _both_texts(self) -> Lecs:
        if "{query}" not in self.prompt or "{candidate}" not in self.prompt:
            raise ValueError("`prompt` needs {query} and {candidate}")
        return self


class Task(Section):
    """A task's YAML file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    data: str
    """JSONL file of items, in the folder of the YAML file."""
    ranking: Ranking | None = None
    generation: Generation | None = None
    lecs: Lecs | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> Task:
        if sum(part is not None for part in (self.ranking, self.generation, self.lecs)) != 1:
            raise ValueError("a task has one of `ranking:`, `generation:` and `lecs:`")
        return self


@dataclass(frozen=True)
class RankingItem:
    """A choice among texts; `answer` is the right one's number."""

    prompt: str
    choices: tuple[str, ...]
    continuation: str
    answer: int
    group: str
    cluster: str


@dataclass(frozen=True)
class GenerationItem:
    """A prompt and the answer to it, or the tests of a program that begins with it.

    `suffix`: what follows the answer; None where the model is not shown it."""

    prompt: str
    answer: str
    tests: str
    suffix: str | None
    group: str
    cluster: str


@dataclass(frozen=True)
class LecsItem:
    """A choice between two candidates. `group`: their kinds; `cluster`: the file or problem."""

    query: str
    equivalent: str
    other: str
    group: str
    cluster: str


@dataclass(frozen=True)
class OpenTask:
    """A task and its items, in the order of the file."""

    task: Task
    items: tuple[RankingItem | GenerationItem | LecsItem, ...]


def open_task(path: Path) -> OpenTask:
    """The task of a YAML file.

    Raises:
        UserError: the file or an item is not as it should be, with file and line.
    """
    task = load_section(Task, path)
    data = inside(path.parent, task.data, f"{path}: data")
    if task.lecs:
        return OpenTask(task, _lecs_items(data, task.lecs))
    read: Any = _ranking_item if task.ranking else _generation_item
    items = []
    for number, record in read_json_lines(data, "a task's items are JSON lines"):
        try:
            items.append(read(record, str(number), task))
        except (KeyError, TypeError, ValueError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{data}, line {number}: {missing}; correct the item") from None
    if not items:
        raise UserError(f"{data}: has no items; a task needs at least one")
    return OpenTask(task, tuple(items))


def open_tasks(paths: Sequence[str | Path]) -> list[OpenTask]:
    """Tasks of YAML files, and of all YAML files of folders, by name.

    Raises:
        UserError: a path is neither, a folder has none, or two tasks have the same name.
    """
    found: dict[str, OpenTask] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: has no task (*.yaml); give a folder with tasks, or a file")
        for file in files:
            task = open_task(file)
            if task.task.name in found:
                raise UserError(f"{file}: another task is named {task.task.name}, too; rename one")
            found[task.task.name] = task
    return list(found.values())


def _ranking_item(record: dict[str, Any], number: str, task: Task) -> RankingItem:
    assert task.ranking
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("`choices` is a list of two texts or more")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"`answer` is the number of a choice, 0 to {len(choices) - 1}")
    item = RankingItem(
        _text(record, "prompt", ""),
        tuple(_text({"choices": choice}, "choices") for choice in choices),
        _text(record, "continuation", ""),
        answer,
        _text(record, "group", ""),
        _text(record, "cluster", number),
    )
    if task.ranking.score == "continuation" and not item.continuation:
        raise ValueError("`score: continuation` needs a `continuation`")
    if task.ranking.score == "label" and not all(item.choices):
        raise ValueError("`score: label` needs choices with text")
    return item


def _generation_item(record: dict[str, Any], number: str, task: Task) -> GenerationItem:
    assert task.generation
    needed = {"exact": "answer", "run": "tests"}[task.generation.check]
    if needed not in record:
        raise KeyError(needed)
    return GenerationItem(
        _text(record, "prompt"),
        _text(record, "answer", ""),
        _text(record, "tests", ""),
        _text(record, "suffix") if "suffix" in record else None,
        _text(record, "group", ""),
        _text(record, "cluster", number),
    )


def _items_of(record: PairRecord, how: Lecs) -> Iterator[LecsItem]:
    """Every equivalent candidate beside every other one."""
    right = [one for one in record.candidates if one.equivalent]
    wrong = [one for one in record.candidates if not one.equivalent]
    for a in right:
        for b in wrong:
            if (how.equivalent is None or a.kind in how.equivalent) and (
                how.other is None or b.kind in how.other
            ):
                kinds = f"{a.kind} | {b.kind}"
                yield LecsItem(record.query, a.text, b.text, kinds, record.group)


def _lecs_items(data: Path, how: Lecs) -> tuple[LecsItem, ...]:
    items = tuple(item for record in read_pairs(data) for item in _items_of(record, how))
    if not items:
        raise UserError(f"{data}: has no pair of the kinds that the task asks for; name others")
    return items


def _text(record: dict[str, Any], key: str, default: str | None = None) -> str:
    value = record[key] if default is None else record.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is a text, not {value!r:.60}")
    return value
