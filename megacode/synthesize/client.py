"""One request to an endpoint and its answer, or why there is none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megacode.errors import UserError
from megacode.synthesize.turns import Endpoint, Role
from megacode.synthesize.wire import read_message, without_key

if TYPE_CHECKING:
    from aiohttp import ClientSession

_AGAIN = (408, 425)
_CONNECT_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes
    seconds: float


class Failed(Exception):
    """No answer, or none that can be read. `reason`: one of few; `detail`: more exact."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail or reason


class Client:
    """The connections.

    Raises:
        UserError: aiohttp is not installed.
    """

    def __init__(self) -> None:
        try:
            import aiohttp
        except ImportError:
            raise UserError(
                "served models need aiohttp, which is not installed; pip install "
                "'megacode[synthesis]'"
            ) from None
        self._http = aiohttp
        self._session: ClientSession

    async def open(self) -> None:
        # No limit of connections, because requests have one; no cookies of servers.
        self._session = self._http.ClientSession(
            connector=self._http.TCPConnector(limit=0), cookie_jar=self._http.DummyCookieJar()
        )

    async def close(self) -> None:
        await self._session.close()

    async def post(self, own: Role, endpoint: Endpoint, body: bytes, seconds: float) -> Answer:
        """An answer of any status below 500.

        Raises:
            Failed: the same request may be answered later.
        """
        http, began = self._http, time.monotonic()
        timeout = http.ClientTimeout(total=seconds, sock_connect=min(seconds, _CONNECT_SECONDS))
        try:
            async with self._session.post(
                endpoint.url,
                data=body,
                headers=own.headers,
                timeout=timeout,
                proxy=endpoint.proxy,
                allow_redirects=False,  # the key is for this address
            ) as response:
                content = without_key(await response.read(), own.key)
        except asyncio.TimeoutError:
            raise Failed("timeout", f"timeout after {seconds:g} s") from None
        except http.ClientPayloadError:
            raise Failed("cut body") from None
        except http.ClientConnectorError as error:
            raise Failed("no connection", str(error)) from None
        except (http.ClientConnectionError, OSError):
            raise Failed("connection lost") from None
        except http.ClientHttpProxyError as error:
            raise Failed(f"HTTP {error.status} of the proxy") from None
        except http.ClientError:
            raise Failed("not HTTP") from None
        if response.status >= 500 or response.status in _AGAIN:
            reason = f"HTTP {response.status}"
            raise Failed(reason, f"{reason}: {read_message(content, own.key)}")
        return Answer(response.status, response.headers, content, time.monotonic() - began)
