"""The backend: one POST per turn, its answer as bytes, and a way to hang up that is heard.

Never a cookie jar (user A's cookie would reach user B), never a redirect followed, never a connection used
twice (a stale one would make a send ambiguous), never a limit that queues a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import zlib
from contextvars import ContextVar
from typing import TYPE_CHECKING

import aiohttp
import structlog
from yarl import URL

from gateway.core.model import EndCode, GatewayError, TurnError
from gateway.core.uistream import STREAM_HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiohappyeyeballs import AddrInfoType
    from multidict import CIMultiDict, CIMultiDictProxy

    from gateway.config import Config

CONNECT_TIMEOUT_SECONDS = 10.0
"""For DNS, TCP and TLS; nginx's proxy_connect_timeout is 60 s, Envoy's 5 s."""

MAX_INFLATED_BYTES = 256 * 1024
"""What one step of decompressing may yield, so that a bomb meets GATEWAY_MAX_EVENT and not our memory."""

log = structlog.get_logger(__name__)

_IDENTITY = frozenset({"identity", ""})
_DEFLATED = frozenset({"gzip", "x-gzip", "deflate"})

_AUTOMATIC_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""What aiohttp would add to a request that has none."""

_sockets: ContextVar[list[socket.socket] | None] = ContextVar("sockets", default=None)


class UpstreamFailed(GatewayError):
    """The backend's answer did not come, or broke off.

    Attributes:
        error: As a ``turn-end`` tells it.
    """

    def __init__(self, code: EndCode, message: str) -> None:
        super().__init__(message)
        self.error = TurnError(code, message)


def make_client_session() -> aiohttp.ClientSession:
    """The one client session of a node, for turns and for what is passed through."""
    connector = aiohttp.TCPConnector(
        limit=0, force_close=True, socket_factory=_make_socket, enable_cleanup_closed=False
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        # `connect`, since `sock_connect` leaves DNS out.
        timeout=aiohttp.ClientTimeout(
            total=None, connect=CONNECT_TIMEOUT_SECONDS, sock_connect=CONNECT_TIMEOUT_SECONDS
        ),
        auto_decompress=False,
        trust_env=False,
    )


def _make_socket(address: AddrInfoType) -> socket.socket:
    """The socket of a connection, remembered for the call that asked for it."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setblocking(False)  # noqa: FBT003 - the standard library's signature
    kept = _sockets.get()
    if kept is not None:
        kept.append(made)
    return made


class UpstreamClient:
    """Posts sends to the backend.

    Args:
        config: For the base URL and the timeouts.
        session: From :func:`make_client_session`.
    """

    def __init__(self, config: Config, session: aiohttp.ClientSession) -> None:
        self._base = config.upstream
        self._session = session
        self._header_timeout_seconds = config.upstream_header_timeout_seconds

    def call(
        self, path: str, *, body: bytes, headers: CIMultiDict[str], method: str = "POST"
    ) -> UpstreamCall:
        """Prepare a request; nothing is sent before it is opened.

        Args:
            path: Path and query, percent-encoded.
            body: As it goes out.
            headers: End to end; ``Host`` and ``Content-Length`` are added.
            method: ``POST``, but for the stop request.
        """
        url = URL(self._base + path, encoded=True)
        return UpstreamCall(
            self._session,
            method=method,
            url=url,
            body=body,
            headers=headers,
            header_timeout_seconds=self._header_timeout_seconds,
        )


class UpstreamCall:
    """One request, from connecting to the last byte of its answer."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        method: str,
        url: URL,
        body: bytes,
        headers: CIMultiDict[str],
        header_timeout_seconds: float,
    ) -> None:
        self._session = session
        self._method = method
        self._url = url
        self.body = body
        """As it goes out."""
        self.headers = headers
        """End to end, as they go out."""
        self._header_timeout_seconds = header_timeout_seconds
        self._sockets: list[socket.socket] = []

    async def open(self) -> UpstreamResponse:
        """Send the request and wait for the head of the answer.

        Raises:
            UpstreamFailed: It did not come.
        """
        _sockets.set(self._sockets)
        seconds = self._header_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                response = await self._session.request(
                    self._method,
                    self._url,
                    # In pieces, so that a body with images does not hold up the event loop.
                    data=io.BytesIO(self.body),
                    headers=self.headers,
                    allow_redirects=False,
                    skip_auto_headers=_AUTOMATIC_HEADERS,
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            # Every client of the session reads it, so it does not say where the backend is.
            log.warning("upstream.unreachable", error=str(error))
            message = "unable to reach the backend; it does not accept connections"
            raise UpstreamFailed(EndCode.UPSTREAM_UNREACHABLE, message) from error
        except TimeoutError as error:
            message = f"the backend did not start to answer within {seconds:g} s"
            raise UpstreamFailed(EndCode.UPSTREAM_TIMEOUT, message) from error
        except (aiohttp.ClientError, OSError) as error:
            message = f"the backend broke off before it answered ({type(error).__name__})"
            raise UpstreamFailed(EndCode.UPSTREAM_CUT_OFF, message) from error
        return UpstreamResponse(response)

    def hang_up(self) -> bool:
        """Tell the backend that nobody listens any more, by ending our side of the connection (FIN).

        A server answers by closing its side, which ends :meth:`open` or the body: the proof that it knows.

        Returns:
            False if there is no connection.
        """
        told = False
        for connection in self._sockets:
            with contextlib.suppress(OSError):  # not connected any more: then it knows
                connection.shutdown(socket.SHUT_WR)
                told = True
        return told


class UpstreamResponse:
    """The head of an answer, and the body to be read."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._inflater: zlib._Decompress | None = None

    @property
    def status(self) -> int:
        """Of HTTP."""
        return self._response.status

    @property
    def reason(self) -> str:
        """The status in words."""
        return self._response.reason or ""

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """As they came."""
        return self._response.headers

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is Server-Sent Events."""
        return self.status == 200 and self._response.content_type.lower() == "text/event-stream"  # noqa: PLR2004

    @property
    def is_ai_sdk(self) -> bool:
        """Whether its headers say that it is an AI SDK stream."""
        return STREAM_HEADER in self._response.headers

    @property
    def _encoding(self) -> str:
        return self._response.headers.get("Content-Encoding", "identity").strip().lower()

    def readable(self, head: bytes) -> bytes:
        """The beginning of a body, decompressed as far as it can be; for people."""
        if self._encoding in _IDENTITY:
            return head
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(head, MAX_INFLATED_BYTES)
        return b""

    async def read(self) -> bytes:
        """What has come of the body, at least a byte; empty at its end. Not decompressed.

        Raises:
            UpstreamFailed: It broke off.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            message = f"the backend's answer broke off ({type(error).__name__})"
            raise UpstreamFailed(EndCode.UPSTREAM_CUT_OFF, message) from error

    def unpacker(self) -> Callable[[bytes], Iterable[bytes]]:
        """What undoes the compression of a body that the backend compressed against our asking.

        Raises:
            UpstreamFailed: It is compressed in a way that is not known here.
        """
        if self._encoding in _IDENTITY:
            return lambda data: (data,)
        if self._encoding not in _DEFLATED:
            message = (
                f"the backend compresses its event stream with {self._encoding!r:.40}, "
                "though it was asked not to"
            )
            raise UpstreamFailed(EndCode.UPSTREAM_NOT_SSE, message)
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
        return self._inflate

    def check_whole(self) -> None:
        """After the last byte.

        Raises:
            UpstreamFailed: What was compressed is not whole.
        """
        if self._inflater is not None and not self._inflater.eof:
            raise UpstreamFailed(EndCode.UPSTREAM_CUT_OFF, "the backend's compressed answer broke off")

    def _inflate(self, data: bytes) -> Iterable[bytes]:
        inflater = self._inflater
        while inflater is not None and data and not inflater.eof:
            try:
                yield inflater.decompress(data, MAX_INFLATED_BYTES)
            except zlib.error as error:
                message = "the backend's compressed answer is damaged"
                raise UpstreamFailed(EndCode.UPSTREAM_CUT_OFF, message) from error
            data = inflater.unconsumed_tail

    def close(self) -> None:
        """Let go of the connection, now."""
        self._response.close()
