"""Records of the usual formats -> conversations.

    messages        [{role, content, ...}, ...], tools        OpenAI
    conversations   [{from, value}, ...], system, tools       ShareGPT
    instruction     input, output, system, history            Alpaca
    prompt          completion; each a text or messages
    input           target

Any of them may have `chat_template_kwargs`, variables of the template; an assistant message of
`weight` 0 is not to be learned. Messages keep all their keys, in their order: a chat template shows
names, tool calls and reasoning as they are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

_ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool", "ipython")},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
NO_CONVERSATION = (
    "has none of `messages`, `conversations`, `instruction` and `output`, `prompt` and "
    "`completion`, `input` and `target`"
)
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "documents"}
_REASONING = ("reasoning_content", "thinking", "reasoning")


class BadConversationError(Exception):
    """The record is no conversation; says why, in words that records of one fault share."""


@dataclass(frozen=True)
class Conversation:
    """`untrained`: numbers of assistant messages that are context, not answers to learn.
    `variables`: of the chat template, such as `enable_thinking`."""

    messages: list[Message]
    tools: list[Any] | None = None
    untrained: tuple[int, ...] = ()
    variables: dict[str, Any] = field(default_factory=dict)


def read_conversation(record: Any) -> Conversation:
    """The conversation of a record, with all its turns.

    Raises:
        BadConversationError: no known format, an unknown role, a turn without text, no answer.
    """
    if not isinstance(record, Mapping):
        raise BadConversationError("the record is not an object")
    context, turns = _turns(record)
    messages = [_message(turn) for turn in (*context, *turns)]
    if not any(message["role"] == "assistant" for message in messages[len(context) :]):
        raise BadConversationError("has no assistant turn")
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadConversationError("`tools` is not a list")
    untrained = tuple(
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
        and (number < len(context) or message.get("weight", 1) == 0)
    )
    variables = record.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict) or variables.keys() & _OWN_VARIABLES:
        raise BadConversationError("`chat_template_kwargs` is not an object of own variables")
    return Conversation(messages, tools or None, untrained, variables)


def without_nulls(value: Any) -> Any:
    """The value without the nulls that Arrow puts in for keys that other records have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def _turns(record: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Turns that are context only, and the others."""
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for key in ("messages", "conversations", "conversation"):
        if record.get(key) is not None:
            turns = record[key]
            if not isinstance(turns, list):
                raise BadConversationError(f"`{key}` is not a list of turns")
            return system, turns
    if "instruction" in record:
        answer = record["output"] if "output" in record else record.get("response")
        query = "\n".join(_text(record, key) for key in ("instruction", "input") if record.get(key))
        history = [turn for pair in record.get("history") or [] for turn in _exchange(*_pair(pair))]
        return system, [*history, *_exchange(query, answer)]
    for first, second in (("prompt", "completion"), ("input", "target")):
        if first in record and second in record:
            prompt, completion = record[first], record[second]
            if isinstance(prompt, list) or isinstance(completion, list):
                before = prompt if isinstance(prompt, list) else _exchange(prompt, None)[:1]
                after = (
                    completion if isinstance(completion, list) else _exchange("", completion)[1:]
                )
                return [*system, *before], after
            return system, _exchange(prompt, completion)
    raise BadConversationError(NO_CONVERSATION)


def _exchange(query: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]


def _pair(pair: Any) -> Sequence[Any]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise BadConversationError("`history` is not a list of [query, answer]")
    return pair


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise BadConversationError(f"`{key}` is not text")
    return record[key]


def _message(turn: Any) -> Message:
    """A turn as a message: role and content under these names, all else as it is."""
    if not isinstance(turn, Mapping):
        raise BadConversationError("a turn is not an object")
    message = dict(turn)
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadConversationError(f"unknown role {given!r}")
    if given == "function_call" and not message.get("tool_calls"):
        call = _json(message.get("content"), "function_call")
        for one in call if isinstance(call, list) else [call]:
            if not isinstance(one, Mapping) or "name" not in one:
                raise BadConversationError("a function_call has no name")
        calls = call if isinstance(call, list) else [call]
        message["tool_calls"] = [{"type": "function", "function": one} for one in calls]
        message["content"] = ""
    message["role"] = role
    _check(message)
    return message


def _check(message: Message) -> None:
    """Every turn has text; an answer may have tool calls or reasoning in its place."""
    content = message.get("content")
    says = any(message.get(key) for key in ("tool_calls", "function_call", *_REASONING))
    if message["role"] == "assistant" and says:
        return
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise BadConversationError(f"a turn holds {other[0]!r} and not text alone")
    elif not isinstance(content, str):
        raise BadConversationError(f"a turn of role {message['role']} has no text")
    if not content and message["role"] in ("user", "assistant"):
        raise BadConversationError(f"a turn of role {message['role']} has no text")


def _json(text: Any, key: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise BadConversationError(f"`{key}` is not JSON") from None
