"""What goes to a server and comes back: chat completions, errors, `Retry-After`, keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeGuard
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from megacode.errors import UserError
from megacode.synthesize.journal import Reply, Usage
from megacode.synthesize.schema import ServedModel
from megacode.tokenizer.tokenizer import well_formed

_MESSAGE = 200
"""Characters of a server's message, at most."""
_LONGEST_PAUSE = 3600.0
_LONG_KEY = 16
"""Characters from which on a key is no ordinary word."""
CHARACTERS = 4
"""Of a token, where nobody counted."""


class Unreadable(ValueError):
    """An answer that is no completion; the text says why in a few words."""


def read_key(role: str, model: ServedModel, environment: Mapping[str, str]) -> str:
    """The API key of a model, or an empty text if it needs none.

    Raises:
        UserError: the environment variable has none.
    """
    if not model.key:
        return ""
    key = environment.get(model.key, "").strip()
    where = f"models.{role}.key: the environment variable {model.key}"
    if not key:
        raise UserError(
            f"{where} is not set; set it to the API key, or leave `key` out if the server needs "
            "none"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{where} has characters that no API key has; set it to the key alone")
    return key


def check_parameters(role: str, model: ServedModel) -> None:
    """Refuse parameters that the one reply to a request cannot be read with.

    Raises:
        UserError: names the parameter.
    """
    where = f"models.{role}.parameters"
    for name in ("model", "messages"):
        if name in model.parameters:
            raise UserError(f"{where}.{name}: is made for each request; leave it out")
    if model.parameters.get("stream"):
        raise UserError(f"{where}.stream: replies are read whole; leave it out")
    if model.parameters.get("n", 1) != 1:
        raise UserError(f"{where}.n: a request has one reply; leave it out and use `samples`")
    try:
        json.dumps(model.parameters, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: cannot be sent as JSON ({error}); put what is no number in quotation marks"
        ) from None


def proxy_for(address: str) -> str | None:
    """The environment's proxy for an address; none for this machine.

    The client's own way of asking the environment takes passwords from ~/.netrc, too."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def estimate(text_length: int) -> int:
    """Tokens of so many characters."""
    return -(-text_length // CHARACTERS)


def prompt_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """About how many tokens messages have."""
    return estimate(sum(len(message["content"]) for message in messages))


def read_reply(content: bytes, model: str, prompt: int, seconds: float) -> Reply:
    """The reply in the body of an answer.

    Args:
        model: its name in the request.
        prompt: tokens of the messages, where the server does not tell.

    Raises:
        Unreadable: the body is no completion.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise Unreadable("not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        raise Unreadable("no completion")
    if not body["choices"]:
        raise Unreadable("no choices")
    choice = body["choices"][0]
    message = choice.get("message") if isinstance(choice, dict) else None
    text = message.get("content") or "" if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise Unreadable("no completion")
    text = well_formed(text)
    return Reply(
        text,
        _word(choice.get("finish_reason")) or "unknown",
        _usage(body.get("usage"), prompt, estimate(len(text))),
        _word(body.get("model")) or model,
        seconds,
    )


def _usage(usage: Any, prompt: int, completion: int) -> Usage:
    if isinstance(usage, dict):
        told, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if _is_count(told) and _is_count(made):
            return Usage(told, made, estimated=False)
    return Usage(prompt, completion, estimated=True)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**40


def _word(value: Any) -> str:
    return well_formed(value) if isinstance(value, str) else ""


def without_key(content: bytes, key: str) -> bytes:
    """An answer that does not give the key back.

    A short key, such as `EMPTY`, is no secret and may be a word of the text."""
    return content.replace(key.encode(), b"[key]") if len(key) >= _LONG_KEY else content


def read_message(content: bytes, key: str) -> str:
    """What a server says about an error, in one short line without the key."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    if key:
        text = text.replace(key, "[key]")
    return " ".join(well_formed(text).split())[:_MESSAGE] or "no message"


def retry_after(value: str | None, date: str | None) -> float | None:
    """Seconds that a `Retry-After` asks to wait: its number, or its date less that of the answer.

    None: it is not there or makes no sense. An hour at most."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            now = parsedate_to_datetime(date) if date else datetime.now(timezone.utc)
            seconds = (parsedate_to_datetime(value) - now).total_seconds()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), _LONGEST_PAUSE) if math.isfinite(seconds) else None
