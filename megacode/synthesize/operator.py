"""An operator: a YAML file that says what is asked of which model, what is rejected, and the row.

    needs: [problem]
    ask:
      - {name: solving, of: teacher, prompt: "Solve it: {{ problem }}"}
    reject:
      no answer: not final_answer(solving.text)
    record:
      messages:
        - {role: user, content: "{{ problem }}"}
        - {role: assistant, content: "{{ solving.text }}"}

Templates know the record's fields, `sample` (from 0), the replies of earlier steps (`.text`,
`.body`, `.tag`, and their sections; all blank where a step was left out) and the functions
`same_answer(a, b)`, `final_answer(text)`, `steps(text)` and `fenced(text)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megacode.errors import UserError
from megacode.recipe.compose import did_you_mean
from megacode.recipe.load import load_section
from megacode.recipe.yaml_tree import Tree, read_yaml
from megacode.synthesize.expressions import math_verify
from megacode.synthesize.reading import read_reply
from megacode.synthesize.rules import PARTS, Read, Rules, Step
from megacode.synthesize.templates import Template, compiled

BUILT_IN = Path(__file__).parent / "operators"


@dataclass(frozen=True)
class Operator:
    """An operator that can be run. `templates`: by key, such as `ask.0.prompt`."""

    name: str
    rules: Rules
    templates: Mapping[str, Template]

    @property
    def roles(self) -> tuple[str, ...]:
        """The models it asks, in order."""
        return tuple(dict.fromkeys(step.of for step in self.rules.ask))

    @property
    def digest(self) -> str:
        """Of all that decides what rows are made."""
        return _digest(self.rules.model_dump(exclude={"description", "samples"}))

    @property
    def prompt_digests(self) -> dict[str, str]:
        """Of each step's prompt and system message."""
        return {step.name: _digest([step.system, step.prompt]) for step in self.rules.ask}

    def missing(self, record: Mapping[str, Any]) -> str:
        """The needed field that a record lacks, or has blank; blank if it has all."""
        for field in self.rules.needs:
            value = record.get(field)
            if value is None or (isinstance(value, str) and not value.strip()):
                return field
        return ""


def open_operator(
    name: str, beside: Path, prompts: Path | None = None, judged: bool = False
) -> Operator:
    """A built-in operator by its name, or one of a file, relative to the folder `beside`.

    Args:
        prompts: a folder whose files STEP.jinja replace prompts.
        judged: a last step asks a judge about the row.

    Raises:
        UserError: there is no such operator, or what is wrong in its file and prompts.
    """
    path = beside / Path(name).expanduser() if name.endswith(".yaml") else _built_in(name)
    tree = read_yaml(path, "operator")
    rules = load_section(Rules, path)
    places: dict[str, str] = {}
    if judged:
        rules = _with_judge(rules, path)
        last = f"ask.{len(rules.ask) - 1}"
        places = {
            f"{last}.{key}": f"{path}: the judge's {key}" for key in ("prompt", "system", "when")
        }
        places[f"reject.{_REFUSED}"] = f"{path}: the judge's verdict"
    if prompts:
        rules, given = _with_prompts(rules, prompts, path)
        places |= given
    if judged:
        rules = _with_row(rules)
    return Operator(name, rules, _templates(rules, tree, places))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()[:16]


def _built_in(name: str) -> Path:
    names = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    if name not in names:
        raise UserError(
            f"there is no operator {name!r}; name a built-in one, or a file that ends in .yaml"
            + did_you_mean(name, names)
        )
    return BUILT_IN / f"{name}.yaml"


_REFUSED = "judge refused"
_JUDGE = """Judge the example below, from which a model is to learn.

<example>
{row}
</example>

The first line of your reply is one word:
accept - what it ends with is right, and so is everything that it presents as right
refuse - anything else
Then say why, in one sentence.
"""


def _with_judge(rules: Rules, path: Path) -> Rules:
    """The rules with a last step that shows the row to a judge, who accepts or refuses it."""
    if any(step.name == "judgement" for step in rules.ask):
        raise UserError(
            f"{path}: has a step named judgement, as `checks.judge` has; rename it, or leave "
            "`checks.judge` out"
        )
    read = Read(tag=["accept", "refuse"])
    step = Step(name="judgement", of="judge", prompt=_JUDGE, read=read)
    reject = {**rules.reject, _REFUSED: "judgement.tag == 'refuse'"}
    return rules.model_copy(update={"ask": [*rules.ask, step], "reject": reject})


def _with_row(rules: Rules) -> Rules:
    """The rules with the row's own templates for `{row}` in the judge's prompt."""
    messages = [f"{one.role}:\n{one.content}" for one in rules.record.messages]
    row = "\n\n".join(messages) or rules.record.text
    *before, judge = rules.ask
    prompt = judge.prompt.replace("{row}", row)
    return rules.model_copy(update={"ask": [*before, judge.model_copy(update={"prompt": prompt})]})


def _with_prompts(rules: Rules, folder: Path, path: Path) -> tuple[Rules, dict[str, str]]:
    """The rules with prompts of files, and where those are."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of prompts; correct `prompts`")
    ask, places = list(rules.ask), {}
    numbers = {f"{step.name}.jinja": number for number, step in enumerate(ask)}
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: has no prompts; put {' or '.join(numbers)} there")
    for file in files:
        if file.name not in numbers:
            raise UserError(f"{file}: {path} has no such step; it takes {', '.join(numbers)}")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); a prompt is UTF-8") from None
        number = numbers[file.name]
        ask[number] = ask[number].model_copy(update={"prompt": text})
        places[f"ask.{number}.prompt"] = str(file)
    return rules.model_copy(update={"ask": ask}), places


def _templates(rules: Rules, tree: Tree, places: Mapping[str, str]) -> dict[str, Template]:
    """Every template by its key, compiled; every mistake in them is told."""
    found, problems = {}, []
    names = [step.name for step in rules.ask]
    parts = {
        step.name: (*PARTS, *(["tag"] if step.read.tag else []), *step.read.sections)
        for step in rules.ask
    }
    for key, source, done, expression in _sources(rules):
        place = places.get(key) or f"{_place(tree, key)}: {key}"
        replies = {name: parts[name] for name in names[:done]}
        try:
            found[key] = compiled(
                source, place, rules.needs, replies, names[done:], expression=expression
            )
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if any("same_answer" in template.names for template in found.values()):
        math_verify()
    return found


def _sources(rules: Rules) -> Iterator[tuple[str, str, int, bool]]:
    """Key, source, number of the steps done before, and whether it is an expression."""
    for number, step in enumerate(rules.ask):
        yield f"ask.{number}.when", step.when or "true", number, True
        yield f"ask.{number}.system", step.system, number, False
        yield f"ask.{number}.prompt", step.prompt, number, False
    steps = len(rules.ask)
    for reason, rule in rules.reject.items():
        yield f"reject.{reason}", rule, steps, True
    for number, message in enumerate(rules.record.messages):
        yield f"record.messages.{number}.content", message.content, steps, False
    yield "record.text", rules.record.text, steps, False
    yield "record.answer", rules.record.answer, steps, False


def _place(tree: Tree, key: str) -> str:
    """File and line of a template."""
    first, _, rest = key.partition(".")
    node, place = tree[first], tree.places[first]
    for part in [rest] if first == "reject" else rest.split("."):
        if isinstance(node, Tree) and part in node:
            node, place = node[part], node.places.get(part, place)
        elif isinstance(node, list):
            node = node[int(part)]
            place = getattr(node, "place", place)
    return place


# -------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Request:
    """What is asked: the step, the role of the model, and messages of a chat."""

    step: str
    role: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Text:
    """A reply. `finish`: why it ended, in the API's words."""

    text: str
    finish: str = "stop"


@dataclass(frozen=True)
class Outcome:
    """A row, or the reason that there is none. `step`: whose reply could not be used."""

    row: dict[str, Any] | None
    reason: str = ""
    answer: str = ""
    step: str = ""


def candidate(
    operator: Operator, record: Mapping[str, Any], sample: int
) -> Generator[Request, Text, Outcome]:
    """Yields requests, is sent the replies, and returns what came of them.

    Raises:
        UserError: a template fails on this record.
    """
    rules, templates = operator.rules, operator.templates
    names = {step.name for step in rules.ask}
    values: dict[str, Any] = {
        name: value for name, value in record.items() if value is not None and name not in names
    }
    values["sample"] = sample
    left = list(rules.reject)

    def rejection() -> str:
        """The first rule that is true; up to one that needs a step not yet done."""
        while left and templates[f"reject.{left[0]}"].names & names <= values.keys():
            reason = left.pop(0)
            if templates[f"reject.{reason}"](values):
                return reason
        return ""

    for number, step in enumerate(rules.ask):
        if reason := rejection():
            return Outcome(None, reason)
        if not templates[f"ask.{number}.when"](values):
            values[step.name] = _reply(step, "")[0]
            continue
        system, prompt = (templates[f"ask.{number}.{key}"](values) for key in ("system", "prompt"))
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        reply = yield Request(step.name, step.of, tuple(messages))
        if reply.finish == "length" and not step.may_be_cut:
            return Outcome(None, "cut off (length)", step=step.name)
        if reply.finish == "content_filter":
            return Outcome(None, "content filter", step=step.name)
        values[step.name], problem = _reply(step, reply.text)
        if problem:
            return Outcome(None, problem, step=step.name)
    if reason := rejection():
        return Outcome(None, reason)
    return _outcome(operator, values)


def _reply(step: Step, text: str) -> tuple[SimpleNamespace, str]:
    """A reply as templates see it, and why it cannot be used."""
    read = read_reply(text, step.read.tag, step.read.sections)
    sections = {name: read.sections.get(name, "") for name in step.read.sections}
    return SimpleNamespace(text=read.text, body=read.body, tag=read.tag, **sections), read.problem


def _outcome(operator: Operator, values: Mapping[str, Any]) -> Outcome:
    templates, messages = operator.templates, operator.rules.record.messages
    row: dict[str, Any]
    if messages:
        contents = [templates[f"record.messages.{n}.content"](values) for n in range(len(messages))]
        row = {
            "messages": [
                {"role": message.role, "content": content}
                for message, content in zip(messages, contents, strict=True)
            ]
        }
    else:
        contents = [templates["record.text"](values)]
        row = {"text": contents[0]}
    if not all(contents):
        return Outcome(None, "blank row")
    if answer := templates["record.answer"](values):
        row["answer"] = answer
    return Outcome(row, answer=answer)
