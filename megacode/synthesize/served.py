"""Ask served models: each request once, within the limits of its endpoints, until it is answered.

A role (teacher, judge) is a model at one or more endpoints; roles of the same model at the same
address share its limits. A request waits for its turn, oldest first, and goes to the endpoint with
the fewest in flight.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megacode.errors import UserError
from megacode.synthesize.client import Answer, Client, Failed
from megacode.synthesize.journal import Journal, Reply, request_key
from megacode.synthesize.limits import USUAL, Limits, Slot, Waits
from megacode.synthesize.schema import ServedModel
from megacode.synthesize.totals import Totals
from megacode.synthesize.turns import Endpoint, Role, Turns
from megacode.synthesize.wire import (
    Unreadable,
    check_parameters,
    prompt_tokens,
    proxy_for,
    read_key,
    read_message,
    read_reply,
    retry_after,
)

_TRIES = 6
_REFUSALS = 20
"""In a row and without a reply, after which it is not the rows that are wrong."""
_WRONG_ROW = (400, 409, 413, 415, 422)
_PROBE_SECONDS = 60.0


@dataclass(frozen=True)
class Refusal:
    """No reply; the next run asks again."""

    reason: str


class Served:
    """The models of a synthesis file; an async context manager that holds the connections.

    Args:
        models: by role.
        journal: is asked first, and keeps every reply.
        environment: has the API keys.
        on_event: gets a line when an endpoint dies or is back.

    Raises:
        UserError: a key is not set, a parameter makes no sense, or the client is not installed.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        journal: Journal,
        environment: Mapping[str, str] = os.environ,
        *,
        on_event: Callable[[str], None] = print,
        waits: Waits = USUAL,
    ) -> None:
        self._client = Client()
        self._journal, self._waits, self._on_event = journal, waits, on_event
        places: dict[tuple[str, str], tuple[str, Endpoint]] = {}
        self._roles: dict[str, Role] = {}
        for name, model in models.items():
            check_parameters(name, model)
            key = read_key(name, model, environment)
            ends = [self._endpoint(name, models, address, places) for address in model.endpoints]
            self._roles[name] = Role(name, model, key, ends)
        self._turns = Turns(self._roles.values())
        self._asked: dict[str, asyncio.Event] = {}
        self._number = 0

    async def __aenter__(self) -> Served:
        await self._client.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._turns.close()
        ends = {id(end): end for role in self._roles.values() for end in role.endpoints}
        probes = [end.probe for end in ends.values() if end.probe]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await self._client.close()

    def totals(self) -> dict[str, Totals]:
        """What has been done so far, by role."""
        return {name: own.tally.totals(own.model.price) for name, own in self._roles.items()}

    async def reply(
        self, role: str, messages: list[dict[str, str]], sample: int
    ) -> Reply | Refusal:
        """The reply to messages, from the journal or from the role's model.

        Equal requests are sent once. `sample` tells apart those of which several replies are
        wanted.

        Raises:
            UserError: an endpoint refuses every request.
        """
        own = self._roles[role]
        key = request_key(own.model.model, messages, own.model.parameters, sample)
        while (found := self._journal.get(key)) is None and key in self._asked:
            await self._asked[key].wait()
        if found:
            own.tally.hits += 1
            own.tally.add(found.usage, own.tally.kept)
            return found
        self._asked[key] = asyncio.Event()
        try:
            outcome = await self._ask(own, messages, key)
        finally:
            self._asked.pop(key).set()
        own.tally.refusals += isinstance(outcome, Refusal)
        return outcome

    async def _ask(self, own: Role, messages: list[dict[str, str]], key: str) -> Reply | Refusal:
        request = {"model": own.model.model, "messages": messages, **own.model.parameters}
        body = json.dumps(request).encode()
        prompt = prompt_tokens(messages)
        self._number += 1
        number = self._number
        failures: list[tuple[Limits, int]] = []
        while True:
            endpoint, slot = await self._turns.place(own, number, prompt)
            outages = endpoint.limits.outages
            try:
                outcome = await self._send(own, endpoint, slot, body, prompt)
            except Failed as error:
                own.tally.retries[error.reason] += 1
                failures.append((endpoint.limits, outages))
                # Those before an outage are the endpoint's fault. It answered others, or a probe,
                # between the rest: so many in a row make it dead.
                counted = sum(
                    limits is endpoint.limits and limits.outages == then
                    for limits, then in failures
                )
                if counted >= _TRIES:
                    return Refusal(f"failed {_TRIES} times, at last with: {error.reason}")
                wait = min(
                    self._waits.first_retry * 2 ** max(0, counted - 1), self._waits.last_retry
                )
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))
                continue
            if isinstance(outcome, Reply):
                self._journal.put(key, outcome)
                own.tally.replies += 1
                own.tally.seconds += outcome.seconds
                own.tally.add(outcome.usage, own.tally.new)
            if outcome is not None:
                return outcome

    async def _send(
        self, own: Role, endpoint: Endpoint, slot: Slot, body: bytes, prompt: int
    ) -> Reply | Refusal | None:
        """Send a request that has a place. None: a 429, which counts as no try."""
        limits = endpoint.limits
        own.tally.sent += 1
        own.tally.in_flight += 1
        ended = False
        try:
            answer = await self._client.post(own, endpoint, body, own.model.timeout_seconds)
            if answer.status == 429:
                ended = True
                own.tally.retries["HTTP 429"] += 1
                pause = retry_after(answer.headers.get("Retry-After"), answer.headers.get("Date"))
                limits.limited(slot, pause, read_message(answer.content, own.key))
                return None
            if answer.status >= 300:
                ended = True
                limits.refused(slot)
                return self._refusal(own, endpoint, answer)
            try:
                reply = read_reply(answer.content, own.model.model, prompt, answer.seconds)
            except Unreadable as error:
                raise Failed(str(error)) from None
            ended = True
            limits.answered(slot, reply.usage.prompt, reply.usage.completion)
            endpoint.refusals = 0
            return reply
        except Failed:
            ended = True
            limits.failed(slot)
            if limits.dead and endpoint.probe is None:
                endpoint.probe = asyncio.create_task(self._probe(own, endpoint))
            raise
        finally:
            own.tally.in_flight -= 1
            if not ended:
                limits.cancelled(slot)
            self._turns.dispatch()

    def _refusal(self, own: Role, endpoint: Endpoint, answer: Answer) -> Refusal:
        message = read_message(answer.content, own.key)
        remedy = (
            f"check the API key in the environment variable {own.model.key}, the address and "
            "the model's name"
            if own.model.key
            else "check the address and the model's name; if the server needs an API key, name its "
            "environment variable in `key`"
        )
        said = (
            f"models.{own.name}: {endpoint.url} refuses requests for {own.model.model} with HTTP "
            f"{answer.status}: {message}"
        )
        if answer.status not in _WRONG_ROW:
            raise UserError(f"{said}; {remedy}")
        endpoint.refusals += 1
        # A run that is continued sends little but what was refused before: every reply of the
        # journal allows for one more.
        if endpoint.refusals >= _REFUSALS + own.tally.hits:
            raise UserError(
                f"{said} ({endpoint.refusals} in a row, without a reply); check `parameters`; "
                f"{remedy}"
            )
        return Refusal(f"HTTP {answer.status}: {message}")

    async def _probe(self, own: Role, endpoint: Endpoint) -> None:
        """Ask a dead endpoint for one token until it answers. Its own refusal is an answer."""
        limits = endpoint.limits
        messages = [{"role": "user", "content": "Hello"}]
        request = {"model": own.model.model, "messages": messages, "max_tokens": 1}
        body = json.dumps(request).encode()
        seconds = min(own.model.timeout_seconds, _PROBE_SECONDS)
        try:
            while limits.dead:
                await asyncio.sleep(limits.probe_wait)
                if not limits.dead:
                    break
                try:
                    answer = await self._client.post(own, endpoint, body, seconds)
                    if answer.status < 300:
                        read_reply(answer.content, own.model.model, 0, 0.0)
                    limits.probed(None)
                except Failed as error:
                    limits.probed(error.detail)
                except Unreadable as error:
                    limits.probed(str(error))
        finally:
            endpoint.probe = None
        self._turns.dispatch()

    def _endpoint(
        self,
        role: str,
        models: Mapping[str, ServedModel],
        address: str,
        places: dict[tuple[str, str], tuple[str, Endpoint]],
    ) -> Endpoint:
        """The model of a role at an address, which another role may have, too."""
        model = models[role]
        place = (address.rstrip("/"), model.model)
        if place in places:
            first, endpoint = places[place]
            for name in ("in_flight", "requests_per_minute", "tokens_per_minute"):
                if getattr(models[first], name) != getattr(model, name):
                    raise UserError(
                        f"models.{role}.{name}: models.{first} is the same model at {address} and "
                        "has another limit; both share one, so give them the same"
                    )
            return endpoint
        most: Any = model.parameters.get(
            "max_completion_tokens", model.parameters.get("max_tokens")
        )
        limits = Limits(
            place[0],
            model.in_flight,
            model.requests_per_minute,
            model.tokens_per_minute,
            completion=min(most, 1000) if isinstance(most, int) else 1000,
            waits=self._waits,
            on_event=self._on_event,
        )
        url = f"{place[0]}/chat/completions"
        endpoint = Endpoint(url, limits, proxy_for(url))
        places[place] = (role, endpoint)
        return endpoint
