"""Every path that is not the gateway's own, passed to the backend and back as it is.

Nothing is kept: bodies stream both ways, and whichever side is slower slows the other, so that what is in
memory is the sockets' buffers. The request target goes out byte for byte as it came in; ``%2F``, ``..`` and
``//`` mean to the backend what they mean without us. The backend's host is ``GATEWAY_UPSTREAM`` and nothing
that a client writes changes it, so its ``Host`` is that of the backend, and the client's own is in
``X-Forwarded-Host``. An answer that breaks off is broken off here too, and never ended as if it were whole.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web
from yarl import URL

from gateway.edge.bridge import Bridge, NotSwitched, asks_for_websocket, open_websocket
from gateway.edge.connection import STALL_SECONDS, cut_when_stalled, ended_with_client
from gateway.edge.headers import downstream_headers, upstream_request_headers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from multidict import CIMultiDict

    from gateway.config import Config

CONNECT_SECONDS = 5.0
"""For a connection to the backend, a free place in the pool included; nginx has 60 s, Envoy 5 s."""

MAX_HEADER_BYTES = 32 * 1024
"""One header of the backend's; aiohttp's own 8190 is below what Node writes and reads (16 KiB in all)."""

_ABSOLUTE_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_CLIENT_IS_GONE = 499
"""nginx's number, seen in logs only."""

_AUTOMATIC_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""What aiohttp would add to a request that has none."""

_ADDED_HEADERS = web.ResponseKey("added_headers", tuple[str, ...])


class Proxy:
    """Passes requests and WebSockets on.

    Args:
        config: Where the backend is, and how large a frame and how long a silence may be.
        session: Keeps no cookies. Its connector should open a connection per request
            (``force_close=True``): one that the backend closes at the moment of its reuse is a 502.

    The server it runs in must not decompress request bodies (``AppRunner(..., auto_decompress=False)``), and
    :func:`remove_added_headers` belongs in ``app.on_response_prepare``.
    """

    def __init__(self, config: Config, session: aiohttp.ClientSession) -> None:
        if not isinstance(session.cookie_jar, aiohttp.DummyCookieJar):
            raise TypeError(
                "unable to proxy with a session that keeps cookies; one user's would reach another"
            )
        self._config = config
        self._session = session
        self._base = URL(config.upstream)
        self._timeout = aiohttp.ClientTimeout(
            total=None,
            connect=CONNECT_SECONDS,
            # Runs when the request is sent, and not while a slow client holds the answer up.
            sock_read=max(config.upstream_header_timeout_seconds, config.upstream_idle_timeout_seconds),
        )
        self._bridges: set[Bridge] = set()

    async def handle(self, request: web.Request, *, body: bytes | None = None) -> web.StreamResponse:
        """Answer as the backend does.

        Args:
            request: As it came in.
            body: What was read of it already, which must be all of it; ``None`` streams it.
        """
        target = _origin_form(request)
        if target is None:
            return _refuse(400, f"unable to proxy {request.method} {request.raw_path!r}; it names no path")
        base = self._base
        # An encoded path is taken as it is, and the whole target is written as one: yarl would leave out the
        # question mark of an empty query.
        url = URL.build(
            scheme=base.scheme,
            authority=base.raw_authority,
            path=base.raw_path.rstrip("/") + target,
            encoded=True,
        )
        scope = asyncio.timeout(None)
        try:
            async with scope:
                with ended_with_client(request, scope):
                    if asks_for_websocket(request):
                        return await self._handle_websocket(request, url)
                    return await self._handle_http(request, url, body)
        except TimeoutError:
            if scope.expired():
                return web.Response(status=_CLIENT_IS_GONE)
            raise

    async def close(self) -> None:
        """Close every WebSocket with 1001. For ``app.on_shutdown``: the server waits for its handlers."""
        await asyncio.gather(*(bridge.close() for bridge in tuple(self._bridges)))

    async def _handle_http(self, request: web.Request, url: URL, body: bytes | None) -> web.StreamResponse:
        headers = _request_headers(request)
        streamed = _RequestBody(request) if body is None and request.body_exists else None
        if body is None and "Content-Length" in request.headers:
            headers["Content-Length"] = request.headers["Content-Length"]
        try:
            upstream = await self._session.request(
                request.method,
                url,
                headers=headers,
                data=streamed or body,
                skip_auto_headers=_AUTOMATIC_HEADERS,
                allow_redirects=False,
                auto_decompress=False,
                max_field_size=MAX_HEADER_BYTES,
                timeout=self._timeout,
            )
        except (aiohttp.ClientError, OSError) as error:
            if streamed is not None and streamed.stalled:
                return _refuse(408, f"unable to read the request; nothing came for {STALL_SECONDS:g} s")
            return _failure(error)
        return await self._pass_back(request, upstream)

    async def _pass_back(self, request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = downstream_headers(upstream.headers, reframed=False)
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
        response[_ADDED_HEADERS] = tuple(name for name in ("Content-Type", "Server") if name not in headers)
        try:
            with cut_when_stalled(request.transport):
                await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                with cut_when_stalled(request.transport):
                    await response.write(chunk)
            with cut_when_stalled(request.transport):
                await response.write_eof()
        except (aiohttp.ClientError, OSError):
            # Without a last chunk, or short of its length, it is told from a whole answer. Where it was the
            # client who left, there is nothing left to close.
            if request.transport is not None:
                request.transport.close()
        finally:
            # What was not read to its end is closed: the backend must hear that nobody listens.
            upstream.close()
        return response

    async def _handle_websocket(self, request: web.Request, url: URL) -> web.StreamResponse:
        try:
            bridge = await open_websocket(
                request,
                url,
                session=self._session,
                headers=_request_headers(request),
                timeout=self._timeout,
                max_message_bytes=self._config.max_body_bytes,
                heartbeat_seconds=self._config.heartbeat_seconds,
            )
        except NotSwitched as refusal:
            return await self._pass_back(request, refusal.response)
        except (aiohttp.ClientError, OSError) as error:
            return _failure(error)
        self._bridges.add(bridge)
        try:
            return await bridge.run()
        finally:
            self._bridges.discard(bridge)


async def remove_added_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For ``app.on_response_prepare``: take back what aiohttp adds to an answer that came without."""
    del request
    for name in response.get(_ADDED_HEADERS, ()):
        response.headers.popall(name, None)


class _RequestBody:
    """What the client sends, as it comes.

    Attributes:
        stalled: The client stopped sending, and the request was given up.
    """

    def __init__(self, request: web.Request) -> None:
        self.stalled = False
        self._content = request.content

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        while True:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    chunk = await self._content.readany()
            except TimeoutError:
                self.stalled = True
                raise
            if not chunk:
                return
            yield chunk


def _request_headers(request: web.Request) -> CIMultiDict[str]:
    return upstream_request_headers(
        request.headers,
        peer=request.remote or "",
        scheme=request.scheme,
        host=request.headers.get("Host", ""),
    )


def _origin_form(request: web.Request) -> str | None:
    """The request target without a host, or ``None``: ``CONNECT`` and ``*`` name no path."""
    target = request.raw_path
    absolute = _ABSOLUTE_FORM.match(target)
    if absolute:
        target = target[absolute.end() :]
        target = target if target.startswith("/") else f"/{target}"
    return target if target.startswith("/") else None


def _failure(error: Exception) -> web.Response:
    match error:
        case aiohttp.ConnectionTimeoutError():
            return _refuse(504, f"unable to reach the backend; no connection in {CONNECT_SECONDS:g} s")
        case TimeoutError():
            return _refuse(504, "unable to get an answer of the backend; it was silent for too long")
        case aiohttp.ClientConnectorDNSError():
            reason = "its name cannot be resolved"
        case aiohttp.ClientSSLError() | aiohttp.ClientConnectorCertificateError():
            reason = "its TLS connection cannot be trusted"
        case aiohttp.ClientConnectorError():
            reason = "it does not accept connections. Is it running, and is GATEWAY_UPSTREAM right?"
        case aiohttp.ClientResponseError():
            return _refuse(502, "unable to understand the backend; its answer is no valid HTTP")
        case _:
            reason = "it closed the connection without an answer"
    return _refuse(502, f"unable to reach the backend; {reason}")


def _refuse(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers={"X-Content-Type-Options": "nosniff"})
