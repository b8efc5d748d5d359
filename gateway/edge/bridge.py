"""A WebSocket of a client, joined to one of the backend, frame by frame.

Each side is read only as fast as the other takes: there is no queue between. Pings, pongs, subprotocol and
close codes pass; compression does not, since it would cost memory per socket. A side that is gone without
a close is told to the other as 1001.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
from aiohttp import WSMsgType, web

from gateway.edge.connection import cut_when_stalled
from gateway.edge.headers import downstream_headers

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType
    from multidict import CIMultiDict
    from yarl import URL

_SWITCHING = 101
_CLOSE_SECONDS = 5.0

Client = web.WebSocketResponse[bool]
Backend = aiohttp.ClientWebSocketResponse[bool]


class NotSwitched(Exception):
    """The backend answered, but not with a WebSocket.

    Attributes:
        response: Its answer, unread. Whoever catches this closes it.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        super().__init__(f"unable to open a WebSocket to the backend; it answered {response.status}")
        self.response = response


class _Close(NamedTuple):
    code: int
    reason: bytes = b""


_GONE = _Close(aiohttp.WSCloseCode.GOING_AWAY)


def asks_for_websocket(request: web.Request) -> bool:
    """Whether it is a whole handshake; half a one is a request like others, and the backend's to judge."""
    # With what the client offers, since the library warns of offers that it does not know.
    return web.WebSocketResponse(protocols=_offered(request)).can_prepare(request).ok


async def open_websocket(
    request: web.Request,
    url: URL,
    *,
    session: aiohttp.ClientSession,
    headers: CIMultiDict[str],
    timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the client library's settings, and no deadline of ours
    max_message_bytes: int,
    heartbeat_seconds: float,
) -> Bridge:
    """Open the backend's side first, since it decides whether there is a socket, then the client's.

    Raises:
        NotSwitched: The backend refused.
        aiohttp.ClientError, OSError: It could not be reached, or the client is gone.
    """
    answers: list[aiohttp.ClientResponse] = []

    async def only_switched(
        upstream_request: aiohttp.ClientRequest, handler: ClientHandlerType
    ) -> aiohttp.ClientResponse:
        # ws_connect follows redirects, and shows nothing of a refusal's body.
        response = await handler(upstream_request)
        if response.status != _SWITCHING:
            raise NotSwitched(response)
        answers.append(response)
        return response

    async with aiohttp.ClientSession(
        connector=session.connector,
        connector_owner=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        timeout=timeout,
        middlewares=(only_switched,),
    ) as switching:
        backend = await switching.ws_connect(
            url,
            protocols=_offered(request),
            headers=_without_handshake(headers),
            autoclose=False,
            autoping=False,
            heartbeat=heartbeat_seconds,
            timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_SECONDS),  # pyright: ignore[reportCallIssue] - attrs
            max_msg_size=max_message_bytes,
            decode_text=False,
        )
    client: Client = web.WebSocketResponse(
        timeout=_CLOSE_SECONDS,
        autoclose=False,
        autoping=False,
        heartbeat=heartbeat_seconds,
        protocols=[backend.protocol] if backend.protocol else [],
        compress=False,
        max_msg_size=max_message_bytes,
        decode_text=False,
    )
    client.headers.extend(_without_handshake(downstream_headers(answers[0].headers, reframed=True)))
    try:
        await client.prepare(request)
    except BaseException:
        await backend.close(code=_GONE.code)
        raise
    return Bridge(request, client, backend, answers[0])


class Bridge:
    """Two open sockets. Run it, once."""

    def __init__(
        self, request: web.Request, client: Client, backend: Backend, answer: aiohttp.ClientResponse
    ) -> None:
        self._request = request
        self._client = client
        self._backend = backend
        self._answer = answer
        self._end: _Close | None = None

    async def run(self) -> web.StreamResponse:
        """Pass frames both ways until one side closes, and close the other alike."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(self._client, self._backend), name="bridge client to backend")
                group.create_task(self._pass_on(self._backend, self._client), name="bridge backend to client")
        finally:
            await self.close()
        return self._client

    async def close(self) -> None:
        """Close both sides: as one of them asked for, or because the gateway goes away."""
        end = self._end = self._end or _GONE
        # The library leaves one alone that is closing already.
        await asyncio.gather(
            self._backend.close(code=end.code, message=end.reason),
            self._client.close(code=end.code, message=end.reason),
        )

    async def _pass_on(self, source: Client | Backend, sink: Client | Backend) -> None:
        try:
            end = await self._pass_on_until_close(source, sink)
        except ConnectionError:
            end = _GONE
        # The first end is the true one; the second is the echo of the close that follows.
        self._end = self._end or end
        await self.close()

    async def _pass_on_until_close(self, source: Client | Backend, sink: Client | Backend) -> _Close:
        while True:
            message = await source.receive()
            with cut_when_stalled(self._transport(sink)):
                match message.type:
                    case WSMsgType.TEXT | WSMsgType.BINARY:
                        await sink.send_frame(message.data, message.type)
                    case WSMsgType.PING:
                        await sink.ping(message.data)
                    case WSMsgType.PONG:
                        await sink.pong(message.data)
                    case WSMsgType.CLOSE:
                        # 0 stands for a close without a code, which the library cannot write.
                        return _Close(message.data or aiohttp.WSCloseCode.OK, (message.extra or "").encode())
                    case WSMsgType.ERROR if isinstance(message.data, aiohttp.WebSocketError):
                        return _Close(message.data.code)
                    case _:
                        return _GONE

    def _transport(self, side: Client | Backend) -> asyncio.Transport | None:
        if side is self._client:
            return self._request.transport
        return None if self._answer.connection is None else self._answer.connection.transport


def _offered(request: web.Request) -> list[str]:
    offers = ",".join(request.headers.getall("Sec-WebSocket-Protocol", ()))
    return [offer.strip() for offer in offers.split(",") if offer.strip()]


def _without_handshake(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """The headers without those that each side's own handshake writes."""
    return type(headers)(
        (name, value) for name, value in headers.items() if not name.lower().startswith("sec-websocket-")
    )
