"""Chat templates: a conversation -> text, and which characters of it the assistant wrote.

1. `load_chat_template` finds the template: beside the tokenizer, or a built-in one by name.
2. `ChatTemplate.render` writes a conversation as transformers does, in a sandbox.
3. `ChatTemplate.render_answers` also gives the spans of characters that are answers, from the
   template's `{% generation %}` blocks, or by rendering the conversation up to a turn and with
   the turn's text replaced.
4. `encode_chat` turns text with control tokens into ids.
"""

from __future__ import annotations

import datetime
import importlib.resources
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer

BUILT_IN = ("chatml", "crystal", "llama-3", "alpaca", "plain")
Message = Mapping[str, Any]
Span = tuple[int, int]


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
    _environment: _Environment = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_environment", _Environment())

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
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
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
        text = self.render(messages, tools, **more)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return text, []
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.text):
            return text, self._marked(text, messages, tools, more)
        spans = [self._turn(text, i, messages, tools, more) for i in turns]
        if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
            raise TemplateError("the answers of the chat template overlap")
        return text, spans

    def turn_end(self) -> str:
        """The control token that ends the assistant's turn; empty if there is none."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text, spans = self.render_answers(turns)
        tokens = re.findall(_alternatives(self.control_tokens), text[slice(*spans[-1])])
        return tokens[0] if tokens else ""

    # ------------------------------------------------------------------------ spans by blocks

    def _marked(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, more: Any
    ) -> list[Span]:
        """The spans of `{% generation %}` blocks: rendered with marks around them."""
        start, end = _unused(text, 2)
        self._environment.marks = (start, end)
        try:
            marked = self.render(messages, tools, **more)
        finally:
            self._environment.marks = ("", "")
        spans: list[Span] = []
        plain, begin = "", 0
        for piece in re.split(f"([{start}{end}])", marked):
            if piece == start:
                begin = len(plain)
            elif piece == end:
                spans.append((begin, len(plain)))
            else:
                plain += piece
        spans = [span for span in spans if span[0] < span[1]]
        if plain != text or not spans:
            raise TemplateError(
                "the `generation` blocks of the chat template do not mark an answer"
            )
        return spans

    # ----------------------------------------------------------------------- spans by rendering

    def _turn(
        self,
        text: str,
        number: int,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        more: Mapping[str, Any],
    ) -> Span:
        """The span of turn `number`, by rendering the conversation before, up to and without it."""
        before = messages[:number]
        prompt = self._prefix(text, before, tools, {**more, "add_generation_prompt": True})
        ignored = prompt == self._prefix(
            text, before, tools, more
        )  # this template writes no prompt
        start, end = self._blanked(text, number, messages, tools, more)
        if prompt is not None and not ignored:
            start = prompt
        if (known := self._prefix(text, messages[: number + 1], tools, more)) is not None:
            end = known
        answer = text[start:end].rstrip()
        if any(answer.endswith(token) for token in self.control_tokens):
            end = start + len(answer)  # a line break after the end of the turn is not written
        return start, end

    def _prefix(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        more: Mapping[str, Any],
    ) -> int | None:
        """Characters of the rendered beginning of a conversation; None unless `text` begins so."""
        try:
            beginning = self.render(messages, tools, **more)
        except TemplateError:
            return None
        return len(beginning) if beginning and text.startswith(beginning) else None

    def _blanked(
        self,
        text: str,
        number: int,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        more: Mapping[str, Any],
    ) -> Span:
        """The characters that change when the turn says something else, and its end token."""
        (mark,) = _unused(text, 1)
        turn = messages[number]
        other = {"role": "assistant", "content": mark}
        blank = self.render([*messages[:number], other, *messages[number + 1 :]], tools, **more)
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
        return start, end + len(self._turn_end(text[end:], messages[:number], tools, more))

    def _turn_end(
        self,
        following: str,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        more: Mapping[str, Any],
    ) -> str:
        """The control token that ends a turn after `messages`, if `following` begins with it."""
        (mark,) = _unused(following, 1)
        turn = {"role": "assistant", "content": mark}
        try:
            after = self.render([*messages, turn], tools, **more).rpartition(mark)[2]
        except TemplateError:
            return ""
        token = re.match(rf"\s*({_alternatives(self.control_tokens)})", after)
        return token[0] if token and following.startswith(token[0]) else ""


def load_chat_template(tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate:
    """The template beside the tokenizer's file, or the built-in `name`.

    `chat_template.jinja` comes before `chat_template` in tokenizer_config.json, as in transformers.

    Raises:
        UserError: there is none, or no built-in one of that name.
    """
    beside = tokenizer.path.parent
    variables = _special_tokens(tokenizer)
    control = frozenset(tokenizer.control_tokens)
    if name is not None:
        if name not in BUILT_IN:
            raise UserError(f"--template {name}: give one of {', '.join(BUILT_IN)}")
        file = importlib.resources.files("megacode.tokenizer") / "templates" / f"{name}.jinja"
        return ChatTemplate(name, file.read_text(encoding="utf-8"), variables, control)
    file = beside / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(str(file), file.read_text(encoding="utf-8"), variables, control)
    config = _config(beside / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise UserError(
            f"{tokenizer.path}: no chat template beside it (chat_template.jinja, or "
            "`chat_template` in tokenizer_config.json); name a built-in one: "
            f"{', '.join(BUILT_IN)}"
        )
    return ChatTemplate(str(beside / "tokenizer_config.json"), template, variables, control)


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


# ------------------------------------------------------------------------------------ encoding


class ChatEncoder:
    """Text of a chat template -> ids, with control tokens where the text spells them.

    The template writes control tokens. A turn that spells one would become one: ask
    `control_token_in` first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._control = re.compile(f"({_alternatives(frozenset(tokenizer.control_tokens))})")
        self._library = _with_control_tokens(tokenizer) if tokenizer.kind == "huggingface" else None

    def control_token_in(self, messages: Any) -> str | None:
        """A control token that a text of the messages spells."""
        if isinstance(messages, str):
            found = self._control.search(messages)
            return found[0] if found else None
        if isinstance(messages, Mapping):
            messages = list(messages.values())
        if isinstance(messages, (list, tuple)):
            return next(filter(None, map(self.control_token_in, messages)), None)
        return None

    def encode(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids [n], and the characters [start, end) of each, [n, 2]. As transformers encodes it."""
        if self._library is not None:
            encoding = self._library.encode(text, add_special_tokens=False)
            return _arrays(encoding.ids, encoding.offsets)
        ids: list[int] = []
        places: list[Span] = []
        position = 0
        for number, piece in enumerate(self._control.split(text)):
            if number % 2:
                ids.append(self.tokenizer.control_tokens[piece])
                places.append((position, position + len(piece)))
            elif piece:
                found, within = self._pieces(piece)
                ids += found
                places += [(position + start, position + end) for start, end in within]
            position += len(piece)
        return _arrays(ids, places)

    def _pieces(self, text: str) -> tuple[list[int], list[Span]]:
        """Plain text with the other libraries, which give no places with the ids."""
        base: Any = self.tokenizer.base
        if self.tokenizer.kind == "sentencepiece":
            pieces = _sentencepieces(base.processor, text)
            return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]
        ids = base.encoding.encode_ordinary(text)
        sizes = [len(base.encoding.decode_single_token_bytes(i)) for i in ids]
        ends = list(itertools.accumulate(sizes))
        # Characters before each byte of the text, as tokens are runs of bytes.
        characters = np.cumsum([(byte & 0xC0) != 0x80 for byte in text.encode()])
        return ids, [
            (int(characters[end - size]) - 1, int(characters[end - 1]))
            for end, size in zip(ends, sizes, strict=True)
        ]


def _sentencepieces(processor: Any, text: str) -> Any:
    """Pieces with `id`, `begin` and `end`; the argument's name changed after sentencepiece 0.2."""
    try:
        return processor.encode(text, return_type="proto").pieces
    except TypeError:
        return processor.encode(text, out_type="immutable_proto").pieces


def _with_control_tokens(tokenizer: Tokenizer) -> Any:
    """The `tokenizers` library set to find control tokens in text, the added ones too."""
    import tokenizers

    base: Any = tokenizer.base
    library = tokenizers.Tokenizer.from_str(base.tokenizer.to_str())
    library.encode_special_tokens = False
    added = [name for name in tokenizer.added_tokens if library.token_to_id(name) is None]
    library.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in added]
    )
    for name, token in tokenizer.added_tokens.items():
        if library.token_to_id(name) != token:
            raise UserError(
                f"{tokenizer.path}: ids of its vocabulary have gaps, so {name} cannot be added for "
                f"conversations as {token}; take it out of `tokenizer.added_tokens`"
            )
    return library


def _arrays(
    ids: Sequence[int], places: Sequence[Span]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.array(ids, dtype=np.int64), np.array(places, dtype=np.int64).reshape(-1, 2)


# -------------------------------------------------------------------------------- the sandbox


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it for chat templates. `marks`: put around `generation` blocks."""

    marks: tuple[str, str] = ("", "")

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
        return f"{start}{caller()}{end}"


def _with_reasoning(message: Message) -> Message:
    """A turn's reasoning under each of the names that templates read it by."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


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


def _alternatives(names: frozenset[str]) -> str:
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
