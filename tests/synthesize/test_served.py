"""Requests to a server that fails in every way: each item has one reply, nothing answered is sent again, and no key is left behind."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import aclosing
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from megacode.errors import UserError
from megacode.synthesize.journal import Journal, Reply, request_key
from megacode.synthesize.limits import Waits
from megacode.synthesize.ordered import in_order
from megacode.synthesize.schema import ServedModel
from megacode.synthesize.served import Refusal, Served
from megacode.synthesize.totals import Totals
from megacode.synthesize.wire import estimate, proxy_for, read_message, retry_after
from tests.synthesize.scripted import (
    HANG,
    Answer,
    Scripted,
    Seen,
    completion,
    cut,
    http,
    nonsense,
    usual,
)

FAST = Waits(cooldown=0.02, first_probe=0.02, last_probe=0.1, first_retry=0.005, last_retry=0.02)
KEY = "planted-0123456789abcdef"
ITEMS = [f"item {number}" for number in range(120)]


def messages(item: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": item}]


def model(*servers: Scripted, **more: Any) -> ServedModel:
    return ServedModel(model="m", endpoints=[server.url for server in servers], **more)


class Asked:
    """Replies to items in order, and what was heard meanwhile."""

    def __init__(
        self,
        path: Path,
        models: ServedModel | dict[str, ServedModel],
        items: Iterable[str] = ITEMS,
        role: Callable[[str], str] = lambda item: "teacher",
        environment: dict[str, str] | None = None,
        watch: Callable[[Served], None] | None = None,
    ) -> None:
        self.events: list[str] = []
        self.totals: dict[str, Totals] = {}
        self.replies = asyncio.run(
            asyncio.wait_for(self._ask(path, models, items, role, environment or {}, watch), 30)
        )

    @property
    def teacher(self) -> Totals:
        return self.totals["teacher"]

    async def _ask(
        self, path: Any, models: Any, items: Any, role: Any, environment: Any, watch: Any
    ) -> list[Reply | Refusal]:
        models = models if isinstance(models, dict) else {"teacher": models}
        replies = []
        with Journal(path / "replies", self.events.append) as journal:
            async with Served(models, journal, environment, on_event=self.events.append, waits=FAST) as served:  # fmt: skip
                ask = lambda item: served.reply(role(item), messages(item), 0)  # noqa: E731
                async with aclosing(in_order(items, ask, lambda: 64)) as results:
                    async for reply in results:
                        replies.append(reply)
                        if watch:
                            watch(served)
                self.totals = served.totals()
        return replies


def complete(asked: Asked, *servers: Scripted, items: list[str] = ITEMS) -> bool:
    """Every item has its own reply, and no server was asked again after it had answered."""
    answered = sum((server.answered for server in servers), Counter())
    texts = [reply.text if isinstance(reply, Reply) else "" for reply in asked.replies]
    return texts == [f"reply to {item}" for item in items] and answered == Counter(items)


def first(times: int, answer: Answer, share: int = 3) -> Callable[[Seen], Answer]:
    """Every so many items are answered so at first, and as usual after that."""

    def script(seen: Seen) -> Answer:
        mine = int(seen.content.split()[-1]) % share == 0 if seen.number else False
        return answer if mine and seen.time <= times else usual(seen)

    return script


def test_replies_are_kept_and_not_asked_for_again(tmp_path: Path) -> None:
    with Scripted() as server:
        served = model(server, parameters={"temperature": 0.5}, price={"input": 1, "output": 2})
        asked = Asked(tmp_path, served)
        assert complete(asked, server)
        reply = asked.replies[5]
        assert isinstance(reply, Reply) and reply.model == "served-1" and reply.finish == "stop"
        made = sum(map(len, ITEMS))
        assert (asked.teacher.sent, asked.teacher.hits, asked.teacher.retries) == (120, 0, {})
        assert asked.teacher.this_run == asked.teacher.everything
        assert asked.teacher.this_run.completion == made and asked.teacher.this_run.prompt == 1200
        assert asked.teacher.this_run.money == pytest.approx((1200 + 2 * made) / 1e6)
        again = Asked(tmp_path, served)
        assert complete(again, server) and again.replies == asked.replies
        assert (again.teacher.sent, again.teacher.hits) == (0, 120)
        assert again.teacher.this_run.money == 0
        assert again.teacher.everything == asked.teacher.everything
        Asked(tmp_path, model(server, parameters={"temperature": 0.6}), ITEMS[:3])
        assert server.sent.total() == 123


def test_what_is_sent(tmp_path: Path) -> None:
    seen: list[Seen] = []

    def script(one: Seen) -> Answer:
        seen.append(one)
        return usual(one)

    with Scripted(script) as server:
        parameters = {"temperature": 0.5, "stop": ["\n"], "extra": {"a": 1}}
        served = model(server, parameters=parameters, key="MY_KEY")
        Asked(tmp_path, served, ["½ item"], environment={"MY_KEY": f" {KEY}\n"})
    assert seen[0].body == {"model": "m", "messages": messages("½ item"), **parameters}
    assert seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert seen[0].headers["Content-Type"] == "application/json"


def test_equal_requests_are_sent_once(tmp_path: Path) -> None:
    with Scripted(lambda seen: (0.02, usual(seen))) as server:
        asked = Asked(tmp_path, model(server), ["same 1", "other 2", "same 1", "same 1"])
        assert server.sent == {"same 1": 1, "other 2": 1}
        assert asked.replies[0] == asked.replies[2] == asked.replies[3]
        assert asked.teacher.hits == 2


def test_as_many_are_in_flight_as_the_file_says(tmp_path: Path) -> None:
    most = 0

    def watch(served: Served) -> None:
        nonlocal most
        most = max(most, served.totals()["teacher"].in_flight)

    with Scripted(lambda seen: (0.005, usual(seen))) as server:
        asked = Asked(tmp_path, model(server, in_flight=20), watch=watch)
        assert complete(asked, server) and server.most == most == 20
        assert asked.teacher.in_flight == 0


FAILURES: dict[str, tuple[Answer, str]] = {
    "500": (http(500, {"error": "out of memory"}), "HTTP 500"),
    "502": (http(502, b"<html>Bad gateway</html>"), "HTTP 502"),
    "503": (http(503, b""), "HTTP 503"),
    "504": (http(504, b""), "HTTP 504"),
    "cut body": (cut(completion("x" * 5000)), "cut body"),
    "not JSON": (http(200, b"<html>all is well</html>"), "not JSON"),
    "deep": (http(200, b"[" * 100_000), "not JSON"),
    "no completion": (http(200, {"error": {"message": "overloaded"}}), "no completion"),
    "list": (http(200, [1]), "no completion"),
    "wrong choice": (http(200, {"choices": ["a"]}), "no completion"),
    "wrong text": (http(200, {"choices": [{"message": {"content": 5}}]}), "no completion"),
    "no choices": (http(200, {"choices": []}), "no choices"),
    "nonsense": (nonsense(), "not HTTP"),
    "closed": (b"\0CUT", "connection lost"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_is_tried_again_until_it_is_answered(tmp_path: Path, name: str) -> None:
    answer, reason = FAILURES[name]
    with Scripted(first(2, answer)) as server:
        asked = Asked(tmp_path, model(server, in_flight=8))
        assert complete(asked, server)
        assert server.sent.total() == asked.teacher.sent == 120 + 2 * 40
        assert asked.teacher.retries == {reason: 80}
        assert asked.events == []


def test_a_server_that_hangs_is_left_after_the_timeout(tmp_path: Path) -> None:
    with Scripted(first(1, HANG, share=40)) as server:
        asked = Asked(tmp_path, model(server, in_flight=8, timeout_seconds=1.0))
        assert complete(asked, server)
        assert asked.teacher.retries == {"timeout": 3}


def test_429_is_waited_for_and_is_no_failed_try(tmp_path: Path) -> None:
    """Ten for one item, more than the tries of a failure."""
    with Scripted(first(10, http(429, {"error": {"message": "slowly"}}, Retry_After="0"), 120)) as server:  # fmt: skip
        asked = Asked(tmp_path, model(server))
        assert complete(asked, server)
        assert asked.teacher.retries == {"HTTP 429": 10} and asked.teacher.refusals == 0


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_storm_of_429_pauses_as_long_as_the_server_says(tmp_path: Path, form: str) -> None:
    began = 0.0
    early = late = 0

    def script(seen: Seen) -> Answer:
        nonlocal began, early, late
        began = began or time.monotonic()
        if time.monotonic() < began + 0.9:
            early += 1
            now = time.time()
            date = {"Date": formatdate(now, usegmt=True)}
            after = formatdate(now + 1, usegmt=True) if form == "date" else "1"
            return http(429, b"", Retry_After=after, **date)
        late += 1
        return usual(seen)

    with Scripted(script) as server:
        asked = Asked(tmp_path, model(server, in_flight=16))
        assert complete(asked, server)
    assert (early, late) == (16, 120), "nothing is sent in the pause"


def test_what_retry_after_says() -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert retry_after("1.5", None) == 1.5
    assert retry_after("Wed, 21 Oct 2015 07:28:30 GMT", date) == 30
    assert retry_after("Wed, 21 Oct 2015 07:27:30 GMT", date) == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:30 GMT", None) == 0
    assert retry_after("99999999", None) == 3600
    for wrong in (None, "soon", "nan", "inf", "Wed, 99 Oct 2015 07:28:30 GMT"):
        assert retry_after(wrong, date) is None


@pytest.mark.parametrize("in_flight", [1, 16])
def test_a_server_that_dies_and_comes_back_loses_nothing(tmp_path: Path, in_flight: int) -> None:
    """The port is closed for much longer than six tries take."""
    with Scripted() as server:

        def watch(_: Served) -> None:
            if server.answered.total() > 30 and not asked_to_close:
                asked_to_close.append(True)
                server.close_port()
                asyncio.get_running_loop().call_later(0.8, server.open_port)

        asked_to_close: list[bool] = []
        asked = Asked(tmp_path, model(server, in_flight=in_flight), watch=watch)
        replies = [reply.text for reply in asked.replies if isinstance(reply, Reply)]
        assert replies == [f"reply to {item}" for item in ITEMS]
        # What the server had sent when it died may not have arrived.
        assert server.answered.total() <= 120 + in_flight
        retries = asked.teacher.retries
        assert retries["no connection"] + retries.get("connection lost", 0) >= 5
        assert asked.teacher.refusals == 0
        down, up = asked.events
        assert "does not answer (Cannot connect" in down and server.url in down
        assert "answers again" in up


def test_a_dead_endpoint_is_probed_one_at_a_time_and_its_requests_go_to_the_other(
    tmp_path: Path,
) -> None:
    with Scripted(lambda seen: http(503, b"")) as dead, Scripted() as alive:
        asked = Asked(tmp_path, model(dead, alive, in_flight=4))
        assert complete(asked, alive) and dead.sent.total() < 20
    with Scripted(lambda seen: HANG) as dead, Scripted(lambda seen: (0.05, usual(seen))) as alive:
        served = model(dead, alive, in_flight=8, timeout_seconds=0.8)
        asked = Asked(tmp_path / "b", served, ITEMS[:60])
        assert complete(asked, alive, items=ITEMS[:60])
        assert 8 <= dead.sent.total() <= 12 and 1 <= dead.probes <= 3


def test_requests_go_where_the_fewest_are_in_flight(tmp_path: Path) -> None:
    with (
        Scripted(lambda seen: (0.04, usual(seen))) as slow,
        Scripted(lambda seen: (0.002, usual(seen))) as fast,
    ):
        asked = Asked(tmp_path, model(slow, fast, in_flight=4))
        assert complete(asked, slow, fast)
        assert 4 <= slow.sent.total() < 40


@pytest.mark.parametrize("alone", [False, True])
def test_a_request_that_fails_again_and_again_is_given_up_for_this_run(
    tmp_path: Path, alone: bool
) -> None:
    """Others are answered meanwhile; where there are none, the probe is."""
    broken = True

    def script(seen: Seen) -> Answer:
        return http(500, b"cuda") if seen.content == "item 7" and broken else usual(seen)

    items = ["item 7"] if alone else ITEMS
    with Scripted(script) as server:
        asked = Asked(tmp_path, model(server, in_flight=4), items)
        place = items.index("item 7")
        assert asked.replies[place] == Refusal("failed 6 times, at last with: HTTP 500")
        assert sum(isinstance(reply, Reply) for reply in asked.replies) == len(items) - 1
        assert server.sent["item 7"] == 6 and asked.teacher.refusals == 1
        assert asked.events == []
        broken = False
        again = Asked(tmp_path, model(server, in_flight=4), items)
        assert complete(again, server, items=items) and again.teacher.sent == 1


def test_two_dead_endpoints_give_up_no_request(tmp_path: Path) -> None:
    """A request alone fails more than six times before both are known to be dead."""

    def script(seen: Seen) -> Answer:
        return http(503, b"loading") if a.probes + b.probes < 8 else usual(seen)

    with Scripted(script) as a, Scripted(script) as b:
        asked = Asked(tmp_path, model(a, b), ["item 1"])
        assert complete(asked, a, b, items=["item 1"])
        assert asked.teacher.retries["HTTP 503"] >= 10 and len(asked.events) >= 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_row_that_is_refused_is_not_sent_again(tmp_path: Path, status: int) -> None:
    said = "the context has 4096 tokens; " + "x" * 300
    refusal = http(status, {"error": {"message": said}})
    with Scripted(lambda seen: refusal if seen.content == "item 7" else usual(seen)) as server:
        asked = Asked(tmp_path, model(server, in_flight=4))
        assert asked.replies[7] == Refusal(f"HTTP {status}: {said[:200]}")
        assert server.sent["item 7"] == 1 and asked.teacher.refusals == 1
        again = Asked(tmp_path, model(server, in_flight=4))
        assert again.replies == asked.replies and again.teacher.sent == 1


def test_20_refusals_in_a_row_end_the_run(tmp_path: Path) -> None:
    refusal = http(400, {"message": "no parameter `temperatur`"})
    with Scripted(lambda seen: refusal) as server:
        with pytest.raises(UserError) as caught:
            Asked(tmp_path, model(server, in_flight=2, parameters={"temperatur": 1}))
        assert 20 <= server.sent.total() < 30
    assert "HTTP 400: no parameter `temperatur` (20 in a row" in str(caught.value)
    assert server.url in str(caught.value) and "check `parameters`" in str(caught.value)


def test_a_run_that_is_continued_may_meet_its_refused_rows_in_a_row(tmp_path: Path) -> None:
    """50 of 120 rows are too long; all others are in the journal."""

    def script(seen: Seen) -> Answer:
        return http(400, b"too long") if int(seen.content[5:]) % 12 < 5 else usual(seen)

    with Scripted(script) as server:
        asked = Asked(tmp_path, model(server))
        again = Asked(tmp_path, model(server))
        assert again.replies == asked.replies
        assert (again.teacher.hits, again.teacher.refusals) == (70, 50)


@pytest.mark.parametrize("status", [301, 401, 402, 403, 404])
def test_an_endpoint_that_wants_no_request_at_all_ends_the_run(tmp_path: Path, status: int) -> None:
    body = {"error": {"message": f"wrong key {KEY}, or no such model"}}
    with Scripted(lambda seen: http(status, body, Location="http://127.0.0.1:9/")) as server:
        served = model(server, key="MY_KEY")
        with pytest.raises(UserError) as caught:
            Asked(tmp_path, served, environment={"MY_KEY": KEY})
    said = str(caught.value)
    for part in (server.url, f"HTTP {status}", "wrong key [key], or no such", "variable MY_KEY"):
        assert part in said
    assert KEY not in said and "\n" not in said


@pytest.mark.parametrize("finish", ["length", "content_filter", None])
def test_replies_that_end_early_are_replies(tmp_path: Path, finish: str | None) -> None:
    with Scripted(lambda seen: completion(None, finish)) as server:
        for _ in range(2):
            (reply,) = Asked(tmp_path, model(server), ["item 1"]).replies
            assert isinstance(reply, Reply)
            assert (reply.finish, reply.text) == (finish or "unknown", "")
        assert server.sent.total() == 1


def test_tokens_are_estimated_where_the_server_does_not_count(tmp_path: Path) -> None:
    wrong = [None, {}, {"prompt_tokens": "many", "completion_tokens": 2**70}]

    def script(seen: Seen) -> Answer:
        return completion("x" * 401, usage=wrong[int(seen.content[5:])])

    with Scripted(script) as server:
        asked = Asked(tmp_path, model(server), ITEMS[:3])
    for reply in asked.replies:
        assert isinstance(reply, Reply) and reply.usage.estimated
        assert (reply.usage.prompt, reply.usage.completion) == (estimate(6), 101)
    assert asked.teacher.estimated == 3


def test_halves_of_characters_are_replaced(tmp_path: Path) -> None:
    with Scripted(lambda seen: completion("cut \ud83d")) as server:
        asked = Asked(tmp_path, model(server), ["item \ud83d 1"])
        assert isinstance(asked.replies[0], Reply) and asked.replies[0].text == "cut \ufffd"


@pytest.mark.parametrize("value", [None, "", " \n", "ключ", "two\nlines"])
def test_a_key_that_is_missing_or_wrong_ends_the_run_before_anything_is_sent(
    tmp_path: Path, value: str | None
) -> None:
    environment = {} if value is None else {"MY_KEY": value}
    with Scripted() as server, pytest.raises(UserError, match=r"models\.teacher\.key.*MY_KEY") as e:
        Asked(tmp_path, model(server, key="MY_KEY"), environment=environment)
    assert not server.headers and not (value and value.strip() and value in str(e.value))


def test_the_key_is_in_no_file_and_no_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """From a server that gives it back in every way."""
    caplog.set_level("DEBUG")

    def script(seen: Seen) -> Answer:
        key = seen.headers["Authorization"]
        number = seen.number % 4
        if number == 0:
            return http(503, key.encode())
        if number == 1 and seen.time == 1:
            return http(429, {"error": key}, X_Key=key)
        if number == 2 and seen.time == 1:
            return http(400, {"error": {"message": "x" * 180 + key}})
        return completion(f"you sent {key}", finish=key)

    with Scripted(script) as server:
        served = model(server, key="MY_KEY", in_flight=4)
        asked = Asked(tmp_path, served, environment={"MY_KEY": KEY})
    assert {type(reply) for reply in asked.replies} == {Reply, Refusal}
    said = [
        repr(asked.replies),
        repr(asked.totals),
        *asked.events,
        caplog.text,
        *capfd.readouterr(),
    ]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and all(header["Authorization"] == f"Bearer {KEY}" for header in server.headers)
    for part in (KEY, KEY[:12]):
        assert not any(part in text for text in said)
        assert not any(part.encode() in content for content in files)


def test_a_short_key_may_be_a_word_of_a_reply(tmp_path: Path) -> None:
    with Scripted(lambda seen: completion("The list is EMPTY.")) as server:
        served = model(server, key="MY_KEY")
        asked = Asked(tmp_path, served, ["item 1"], environment={"MY_KEY": "EMPTY"})
    assert isinstance(asked.replies[0], Reply) and asked.replies[0].text == "The list is EMPTY."


def test_messages_of_servers_are_one_short_line() -> None:
    assert read_message(b'{"error": {"message": "a\\nb", "code": 3}}', "") == "a b"
    assert read_message(b'{"object": "error", "message": "c"}', "") == "c"
    assert read_message(b'{"detail": [{"loc": "d"}]}', "") == '[{"loc": "d"}]'
    assert read_message(b"<b>\xff" + b"x" * 999, "") == "<b>\ufffd" + "x" * 196
    assert read_message(b"", "") == "no message"


def test_roles_of_the_same_model_share_its_limits(tmp_path: Path) -> None:
    with Scripted(lambda seen: (0.003, usual(seen))) as server:
        judge = model(server, in_flight=6, parameters={"temperature": 0.0})
        models = {"teacher": model(server, in_flight=6), "judge": judge}
        asked = Asked(
            tmp_path, models, role=lambda item: "judge" if item.endswith("3") else "teacher"
        )
        assert complete(asked, server) and server.most == 6
        assert asked.totals["judge"].sent == 12 and asked.totals["teacher"].sent == 108
        models["judge"] = model(server, in_flight=7)
        with pytest.raises(UserError, match=r"models\.judge\.in_flight: models\.teacher is the"):
            Asked(tmp_path, models)
        models["judge"] = ServedModel(model="n", endpoints=[server.url], in_flight=4)
        Asked(
            tmp_path / "b", models, role=lambda item: "judge" if item.endswith("3") else "teacher"
        )
        assert server.most > 6, "another model"


def test_a_rate_of_requests_is_kept(tmp_path: Path) -> None:
    with Scripted() as server:
        began = time.monotonic()
        asked = Asked(tmp_path, model(server, requests_per_minute=6000))
        assert complete(asked, server)
        assert time.monotonic() - began > 0.15, "100 of 120 at once, the others at 100 a second"


@pytest.mark.parametrize(
    "parameters, says",
    [
        ({"stream": True}, "stream: replies are read whole"),
        ({"n": 2}, "n: a request has one reply"),
        ({"model": "x"}, "model: is made for each"),
        ({"top_p": float("nan")}, "cannot be sent as JSON"),
        ({"user": Path("a")}, "cannot be sent as JSON"),
    ],
)
def test_parameters_that_cannot_be_sent(
    tmp_path: Path, parameters: dict[str, Any], says: str
) -> None:
    with Scripted() as server, pytest.raises(UserError, match=rf"models\.teacher\.parameters.*{says}"):  # fmt: skip
        Asked(tmp_path, model(server, parameters=parameters))


def test_the_client_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with Scripted() as server, pytest.raises(UserError, match=r"pip install 'megacode\[synthesis\]'"):  # fmt: skip
        Asked(tmp_path, model(server))


def test_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert proxy_for("https://api.example/v1") is None
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("http_proxy", "http://proxy:3129")
    monkeypatch.setenv("no_proxy", ".inside.example")
    assert proxy_for("https://api.example/v1") == "http://proxy:3128"
    assert proxy_for("http://api.example/v1") == "http://proxy:3129"
    assert proxy_for("https://a.inside.example/v1") is None
    for local in ("http://127.0.0.1:8000/v1", "http://localhost:8000/v1"):
        assert proxy_for(local) is None


def test_a_proxy_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scripted() as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        served = ServedModel(model="m", endpoints=["http://api.invalid/v1"])
        asked = Asked(tmp_path, served, ITEMS[:5])
        assert complete(asked, server, items=ITEMS[:5])
        assert server.headers[0]["Host"] == "api.invalid"


def test_totals_only_grow(tmp_path: Path) -> None:
    seen: list[Totals] = []
    with Scripted(first(1, http(500, b""))) as server:
        Asked(
            tmp_path,
            model(server),
            watch=lambda served: seen.append(served.totals()["teacher"]),
        )
    for before, after in itertools.pairwise(seen):
        assert before.sent <= after.sent and before.replies <= after.replies
        assert before.everything.money <= after.everything.money
        assert Counter(before.retries) <= Counter(after.retries)


ASKS = """
import asyncio, json, sys
from contextlib import aclosing
from pathlib import Path
from megacode.synthesize.journal import Journal
from megacode.synthesize.ordered import in_order
from megacode.synthesize.schema import ServedModel
from megacode.synthesize.served import Served

async def main(path, url, count):
    models = {"teacher": ServedModel(model="m", endpoints=[url], in_flight=8)}
    with Journal(Path(path)) as journal:
        async with Served(models, journal) as served:
            def ask(number):
                return served.reply("teacher", [{"role": "user", "content": f"item {number}"}], 0)
            async with aclosing(in_order(range(count), ask, lambda: 32)) as results:
                async for _ in results:
                    pass
asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.timeout(120)
def test_kill_minus_9_at_random_moments_costs_only_what_was_in_flight(tmp_path: Path) -> None:
    count, path = 150, tmp_path / "replies"
    with Scripted(lambda seen: (random.random() / 50, usual(seen))) as server:
        start = [sys.executable, "-c", ASKS, path, server.url, str(count)]
        kept: set[int] = set()
        for _ in range(3):
            before, goal = server.sent.copy(), server.sent.total() + random.randint(10, 45)
            with subprocess.Popen(start) as process:
                while server.sent.total() < goal:
                    assert process.poll() is None
                    time.sleep(0.001)
                process.send_signal(signal.SIGKILL)
            sent = {int(item[5:]) for item in server.sent - before}
            assert not sent & kept, "answered and kept, and sent again"
            with Journal(path, lambda _: None) as journal:
                keys = {number: request_key("m", messages(f"item {number}"), {}, 0) for number in range(count)}  # fmt: skip
                now = {number for number, key in keys.items() if journal.get(key)}
            assert now >= kept and len(sent - now) <= 8, "all but those in flight are kept"
            kept = now
        assert 10 < len(kept) < count
        subprocess.run(start, check=True)
        assert len(server.sent) == count and server.sent.total() <= count + 3 * 8
        with Journal(path) as journal:
            killed = journal.digest()
        asked = Asked(tmp_path / "undisturbed", model(server), [f"item {n}" for n in range(count)])
        assert all(isinstance(reply, Reply) for reply in asked.replies)
    with Journal(tmp_path / "undisturbed" / "replies") as journal:
        assert journal.digest() == killed and len(journal) == count


def test_requests_that_are_cancelled_give_their_places_back(tmp_path: Path) -> None:
    """One is in flight, one has just been given a place, one waits."""

    async def run(server: Scripted) -> None:
        with Journal(tmp_path / "replies") as journal:
            async with Served({"teacher": model(server, in_flight=1)}, journal) as served:

                def ask(item: str) -> asyncio.Task[Reply | Refusal]:
                    return asyncio.create_task(served.reply("teacher", messages(item), 0))

                tasks = [ask("hang 1"), ask("hang 2"), ask("hang 3")]
                while not server.sent["hang 1"]:
                    await asyncio.sleep(0.001)
                tasks[2].cancel()
                tasks[0].cancel()
                await asyncio.wait([tasks[0]])
                tasks[1].cancel()
                await asyncio.wait(tasks)
                assert served.totals()["teacher"].in_flight == 0
                assert isinstance(await ask("item 1"), Reply)
                again = [ask("hang 1"), ask("hang 1")]
                while server.sent["hang 1"] < 2:
                    await asyncio.sleep(0.001)
                server.script = usual
                again[0].cancel()
                assert isinstance(await again[1], Reply), "who waited for the same asks for itself"

    with Scripted(lambda seen: HANG if "hang" in seen.content else usual(seen)) as server:
        asyncio.run(asyncio.wait_for(run(server), 10))
