"""Chat templates: a conversation -> text, and which characters of it the assistant wrote.

1. `load_chat_template` finds the template: beside the tokenizer, a built-in one, or a file.
2. `ChatTemplate.render` writes a conversation as transformers does, in a sandbox.
3. `ChatTemplate.render_answers` also gives the spans of characters that are answers, from the
   template's `{% generation %}` blocks, or by rendering the conversation up to a turn and with
   the turn's text replaced.

`chat_encoding.ChatEncoder` turns the text into ids.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2

from megacode.errors import UserError
from megacode.tokenizer.chat_environment import ChatEnvironment
from megacode.tokenizer.tokenizer import Tokenizer

BUILT_IN = ("chatml", "crystal", "llama-3", "alpaca", "plain")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LOOKS_BACK = re.compile(r"\{%-?\s*(filter|macro|call|block|set\s+[^=%]*%\})|\bloop\(")
"""Jinja's ways to get at what has been rendered."""
_MARKS = ("\U000f0000", "\U000f0001")
"""Private-use characters, put around answers."""
Message = Mapping[str, Any]
Span = tuple[int, int]
Render = Callable[..., str]
"""`ChatTemplate.render` of messages, with the tools and variables of one conversation."""


class TemplateError(Exception):
    """The template refuses a conversation, or does not show which characters are answers."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template for conversations.

    Attributes:
        origin: its file, or the name of a built-in one.
        variables: `bos_token`, `eos_token` and the like, which templates use.
        control_tokens: names of the tokenizer's control tokens.
    """

    origin: str
    text: str
    variables: Mapping[str, str]
    control_tokens: frozenset[str]
    _environment: ChatEnvironment = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_environment", ChatEnvironment())

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return self._environment.from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.origin}:{error.lineno}: not a chat template: {error.message}"
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **more: Any,
    ) -> str:
        """The conversation as text. `more`: variables of the template, such as `enable_thinking`.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                **{**self.variables, **more},
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # the template is data: whatever it raises is its refusal
            raise TemplateError(f"the chat template refuses it: {error}") from None

    def render_answers(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **more: Any
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters [start, end) of each assistant turn.

        A span holds all that the model has to write: thinking, text, tool calls, and the token that
        ends the turn.

        Raises:
            TemplateError: the template refuses the conversation, or the spans cannot be found.
        """

        def render(part: Sequence[Message], **also: Any) -> str:
            return self.render(part, tools, **{**more, **also})

        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if turns and _GENERATION.search(self.text):
            return self._marked(messages, render)
        text = render(messages)
        if not turns:
            return text, []
        shown = self._shown(text, turns, messages, render)
        spans = [
            span or self._turn(text, i, messages, render)
            for i, span in zip(turns, shown, strict=True)
        ]
        if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
            raise TemplateError("the answers of the chat template overlap")
        return text, spans

    def turn_end(self) -> str:
        """The control token that ends the assistant's turn; empty if there is none, or if the
        template takes no simple conversation."""
        for form in ("a", [{"type": "text", "text": "a"}]):
            turns = [{"role": role, "content": form} for role in ("user", "assistant")]
            try:
                text, spans = self.render_answers(turns)
                break
            except TemplateError:
                continue
        else:
            return ""
        tokens = re.findall(alternatives(self.control_tokens), text[slice(*spans[-1])])
        return tokens[0] if tokens else ""

    def default_system(self) -> str:
        """The system prompt that the template writes where a conversation has none; or empty."""
        system, user = _unused("", 2)
        question = {"role": "user", "content": user}
        try:
            given = self.render([{"role": "system", "content": system}, question])
            bare = self.render([question]).partition(user)[0]
        except TemplateError:
            return ""
        before, _, after = given.partition(user)[0].partition(system)
        is_there = bare.startswith(before) and bare.endswith(after)
        return bare[len(before) : len(bare) - len(after)].strip() if is_there else ""

    # ------------------------------------------------------------------------ spans by blocks

    def _marked(self, messages: Sequence[Message], render: Render) -> tuple[str, list[Span]]:
        """The text, and the spans of `{% generation %}` blocks: rendered with marks around them.

        A template that looks at what it has written (`_LOOKS_BACK`) could see the marks, and a
        message could spell them. It is then rendered without marks too, for comparison.
        """
        marked, blocks = self._with_marks(_MARKS, messages, render)
        text, spans = _without_marks(marked, *_MARKS)
        same = all(marked.count(mark) == blocks for mark in _MARKS)
        if not same or _LOOKS_BACK.search(self.text):
            plain = render(messages)
            start, end = _unused(plain, 2)
            text, spans = _without_marks(
                self._with_marks((start, end), messages, render)[0], start, end
            )
            same = text == plain
        spans = [span for span in spans if span[0] < span[1]]
        if not same or not spans:
            raise TemplateError(
                "the `generation` blocks of the chat template do not mark an answer"
            )
        return text, spans

    def _with_marks(
        self, marks: tuple[str, str], messages: Sequence[Message], render: Render
    ) -> tuple[str, int]:
        """The text with marks around `generation` blocks, and how many blocks were rendered."""
        self._environment.marks, self._environment.blocks = marks, 0
        try:
            return render(messages), self._environment.blocks
        finally:
            self._environment.marks = ("", "")

    # ----------------------------------------------------------------------- spans by rendering

    def _shown(
        self, text: str, turns: Sequence[int], messages: Sequence[Message], render: Render
    ) -> list[Span | None]:
        """The spans of turns that the template shows in its usual form, all by one rendering: the
        generation prompt, the turn's text as it is, the end token. None for other turns."""
        start, end = _unused(text, 2)
        marked = [dict(message) for message in messages]
        for i in turns:
            content = marked[i].get("content")
            if set(marked[i]) - {"role", "content", "weight"} or not isinstance(content, str):
                return [None] * len(turns)
            marked[i]["content"] = start + content + end
        try:
            plain, spans = _without_marks(render(marked), start, end)
            prompt, closing = self._frame
        except TemplateError:
            return [None] * len(turns)
        if plain != text or len(spans) != len(turns):
            return [None] * len(turns)
        return [
            (first, last + len(closing))
            if text[first:last] == messages[i]["content"]
            and text.endswith(prompt, 0, first)
            and text.startswith(closing, last)
            else None
            for i, (first, last) in zip(turns, spans, strict=True)
        ]

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the template writes before an answer, and the end token after it."""
        question: list[Message] = [{"role": "user", "content": "a"}]
        before = self.render(question)
        prompt = self.render(question, add_generation_prompt=True)
        after = self.render([*question, {"role": "assistant", "content": "b"}])
        token = re.match(rf"\s*({alternatives(self.control_tokens)})", after.rpartition("b")[2])
        written = prompt[len(before) :] if prompt.startswith(before) else ""
        return written, token[0] if token else ""

    def _turn(self, text: str, number: int, messages: Sequence[Message], render: Render) -> Span:
        """The span of turn `number`, by rendering the conversation before, up to and without it."""
        before = messages[:number]
        prompt = _prefix(text, before, partial(render, add_generation_prompt=True))
        writes_prompt = prompt != _prefix(text, before, render)
        start, end = self._blanked(text, number, messages, render)
        if prompt is not None and writes_prompt:
            start = prompt
        if (known := _prefix(text, messages[: number + 1], render)) is not None:
            end = known
        answer = text[start:end].rstrip()
        if any(answer.endswith(token) for token in self.control_tokens):
            end = start + len(answer)  # a line break after the end of the turn is not written
        return start, end

    def _blanked(self, text: str, number: int, messages: Sequence[Message], render: Render) -> Span:
        """The characters that change when the turn says something else, and its end token."""
        (mark,) = _unused(text, 1)
        turn = messages[number]
        other = {"role": "assistant", "content": _like(turn, mark)}
        blank = render([*messages[:number], other, *messages[number + 1 :]])
        if blank.count(mark) != 1:
            raise TemplateError(
                f"turn {number + 1} is shown {blank.count(mark)} times by the chat template; "
                "mark answers in it with {% generation %}"
            )
        before, after = blank.split(mark)
        start = _common(before, text)
        if not text.endswith(after) or len(text) - len(after) < start:
            raise TemplateError(
                f"what follows turn {number + 1} depends on it in the chat template; mark answers "
                "in it with {% generation %}"
            )
        end = len(text) - len(after)
        content = turn.get("content")
        if (
            isinstance(content, str)
            and content.split("</think>")[-1].strip() not in text[start:end]
        ):
            raise TemplateError(f"turn {number + 1} is not where the chat template shows it")
        return start, end + len(self._turn_end(text[end:], messages[: number + 1], render))

    def _turn_end(self, following: str, messages: Sequence[Message], render: Render) -> str:
        """The control token that ends the last of `messages`, if `following` begins with it."""
        (mark,) = _unused(following, 1)
        turn = {"role": "assistant", "content": _like(messages[-1], mark)}
        try:
            after = render([*messages[:-1], turn]).rpartition(mark)[2]
        except TemplateError:
            return ""
        token = re.match(rf"\s*({alternatives(self.control_tokens)})", after)
        return token[0] if token and following.startswith(token[0]) else ""


def _prefix(text: str, messages: Sequence[Message], render: Render) -> int | None:
    """Characters of the rendered beginning of a conversation; None unless `text` begins so."""
    try:
        beginning = render(messages)
    except TemplateError:
        return None
    return len(beginning) if beginning and text.startswith(beginning) else None


def chat_template(tokenizer: Tokenizer, origin: str, text: str) -> ChatTemplate:
    """A template with the tokenizer's special tokens."""
    control = frozenset(tokenizer.control_tokens)
    return ChatTemplate(origin, text, _special_tokens(tokenizer), control)


def load_chat_template(
    tokenizer: Tokenizer, name: str | None = None, option: str = "--chat"
) -> ChatTemplate:
    """The template beside the tokenizer's file, the built-in `name`, or that of the file `name`.

    Args:
        option: of the command line, that has the name; for errors.

    Raises:
        UserError: there is none, no built-in one or file of that name, or the built-in one writes
            control tokens that the tokenizer lacks.
    """
    if name is None:
        if found := template_beside(tokenizer):
            return found
        raise UserError(
            f"{tokenizer.path}: no chat template beside it (chat_template.jinja, or "
            f"`chat_template` in tokenizer_config.json); name a built-in one: {option} "
            f"{', '.join(BUILT_IN)}"
        )
    text = template_text(name, option)
    named = {*re.findall(r"<\|\w+\|>", text)} if name in BUILT_IN else set()
    if missing := sorted(named - tokenizer.control_tokens.keys()):
        raise UserError(
            f"{option} {name}: writes {', '.join(missing)}, no control tokens of "
            f"{tokenizer.path}; choose another template, or set `tokenizer.added_tokens`"
        )
    return chat_template(tokenizer, name, text)


def template_text(name: str, option: str = "--chat") -> str:
    """The built-in template `name`, or that of the file `name`. UserError: there is none."""
    if name in BUILT_IN:
        file = importlib.resources.files("megacode.tokenizer") / "templates" / f"{name}.jinja"
        return file.read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(
            f"{option} {name}: give one of {', '.join(BUILT_IN)}, or a file of a template"
        ) from None


def template_beside(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template beside the tokenizer's file; None if there is none.

    `chat_template.jinja` comes before `chat_template` in tokenizer_config.json, as in transformers.
    """
    file, config = (
        tokenizer.path.with_name(name) for name in ("chat_template.jinja", "tokenizer_config.json")
    )
    if file.is_file():
        return chat_template(tokenizer, str(file), file.read_text(encoding="utf-8"))
    text = _config(config).get("chat_template")
    if isinstance(text, list):  # several, by name
        text = {entry["name"]: entry["template"] for entry in text}.get("default")
    return chat_template(tokenizer, str(config), text) if isinstance(text, str) else None


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and the like: of tokenizer_config.json, else of the vocabulary."""
    names = {token: name for name, token in tokenizer.control_tokens.items()}
    base = tokenizer.base
    ids = {"bos_token": base.bos_id, "eos_token": base.eod_id, "pad_token": base.pad_id}
    found = {key: names[token] for key, token in ids.items() if token in names}
    for key, value in _config(tokenizer.path.with_name("tokenizer_config.json")).items():
        if key.endswith("_token") and isinstance(value, (str, dict)):
            text = value if isinstance(value, str) else value.get("content")
            if isinstance(text, str):
                found[key] = text
    return found


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); mend it or take it away") from None


def _with_reasoning(message: Message) -> Message:
    """A turn's reasoning under each of the names that templates read it by."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _like(message: Message, text: str) -> str | list[dict[str, str]]:
    """A text as the content of a turn, in the form that the message has."""
    parts = isinstance(message.get("content"), list)
    return [{"type": "text", "text": text}] if parts else text


def _without_marks(marked: str, start: str, end: str) -> tuple[str, list[Span]]:
    """The text between marks and around them, and where it was marked."""
    spans: list[Span] = []
    plain, begin = "", 0
    for piece in re.split(f"([{start}{end}])", marked):
        if piece == start:
            begin = len(plain)
        elif piece == end:
            spans.append((begin, len(plain)))
        else:
            plain += piece
    return plain, spans


def _unused(text: str, count: int) -> list[str]:
    """Private-use characters that are not in the text."""
    found: list[str] = []
    for code in range(0xF0000, 0xFFFFD):
        if chr(code) not in text:
            found.append(chr(code))
            if len(found) == count:
                break
    return found


def _common(first: str, second: str) -> int:
    """Length of the common beginning."""
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)


def alternatives(names: frozenset[str]) -> str:
    """A regular expression that matches any of the names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
