"""The session protocol where no WebSocket passes: a session's records by event stream or long-poll.

Each request stands for itself: what it gets follows from the cursor that it brings, so a client may change
between these carriers and the socket whenever it likes, in the middle of a turn too.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from gateway.core import wire
from gateway.core.model import Cursor, Refusal
from gateway.core.sse import encode_comment, encode_event
from gateway.edge.admission import Connection
from gateway.edge.commands import (
    CLIENT_IS_GONE,
    answered,
    client_of,
    in_pieces,
    read_to_their_end,
    refused,
)
from gateway.edge.connection import cut_when_stalled
from gateway.edge.pulse import Pulse
from gateway.edge.requests import EVENT_STREAM, place_asked, session_of, wait_asked, wants_stream
from gateway.edge.socketloop import FRAME_BYTES
from gateway.hub import Resync

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.config import Config
    from gateway.core.model import Record, ResyncReason, SessionId
    from gateway.edge.admission import OpenConnections
    from gateway.hub import Subscriber
    from gateway.sessions import Attached, Sessions

log = structlog.get_logger(__name__)

STREAM_CARRIER = "sse"
POLL_CARRIER = "long-poll"

_HEARTBEAT = encode_comment("heartbeat")

_BEGINNING = Cursor("", 0)
"""What an ``EventSource`` that was told ``resync`` asks to go on after: it has dropped what it had."""

_STREAM_HEADERS = {
    "Content-Type": EVENT_STREAM,
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


class _Stay(Connection):
    """A stream or a poll, for as long as it is served.

    Attributes:
        wake: Wakes whoever writes it.
        is_over: It ends once what is due is written; a poll is answered now.
        has_left: It ends, whatever is due: its client continues elsewhere after its last cursor.
    """

    def __init__(self, carrier: str, wake: Callable[[], None]) -> None:
        super().__init__(carrier)
        self.wake = wake
        self.is_over = False
        self.has_left = False
        self._timer: asyncio.TimerHandle | None = None

    def leave(self, seconds: float) -> None:
        """See the base class."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._leave)

    def _leave(self) -> None:
        self.is_over = self.has_left = True
        self.wake()

    async def close(self) -> None:
        """See the base class; whoever serves it ends it."""
        self.is_over = True
        self.wake()

    def ended(self) -> None:
        """It is not served any more."""
        if self._timer is not None:
            self._timer.cancel()


class Fallback:
    """Serves ``GET /gateway/v1/sessions/{session}/events``.

    Args:
        config: For the heartbeat.
        sessions: The verbs.
        connections: Those that are open.
    """

    def __init__(self, config: Config, sessions: Sessions, connections: OpenConnections) -> None:
        self._heartbeat_seconds = config.heartbeat_seconds
        self._sessions = sessions
        self._connections = connections

    async def handle(self, request: web.Request, segment: str) -> web.StreamResponse:
        """Answer a request for a session's records: a stream, or one poll.

        Args:
            request: A GET.
            segment: The session, as the path names it.
        """
        try:
            session = session_of(segment)
            client_of(request)  # nobody is told of it yet, but a bad one is never good
            if wants_stream(request):
                return await self._stream(request, session)
            return await self._poll(request, session)
        except Refusal as refusal:
            return refused(None, refusal)
        except ConnectionError:
            # The client is gone, which is its right; nobody reads what is returned.
            return web.Response(status=CLIENT_IS_GONE)

    async def _stream(self, request: web.Request, session: SessionId) -> web.StreamResponse:
        after = place_asked(request, request.headers.get("Last-Event-ID", ""))
        pulse = Pulse(self._heartbeat_seconds, lambda: _drop(request))
        stay = _Stay(STREAM_CARRIER, pulse.wake)
        attached = None
        try:
            with self._connections.hold(stay):
                attached = await self._sessions.attach(session, after, pulse.wake, carrier=STREAM_CARRIER)
                response = web.StreamResponse(headers=_STREAM_HEADERS)
                await response.prepare(request)

                async def write(data: bytes) -> None:
                    pulse.writing()
                    await response.write(data)
                    pulse.wrote()

                await self._write_events(write, attached, pulse, stay)
                await response.write_eof()
        finally:
            stay.ended()
            pulse.close()
            if attached is not None:
                attached.subscriber.close()
        return response

    async def _write_events(
        self, write: Callable[[bytes], Awaitable[None]], attached: Attached, pulse: Pulse, stay: _Stay
    ) -> None:
        """Until the node stops or the client cannot continue; one that leaves ends the handler."""
        subscriber, standing = attached.subscriber, attached.standing
        session = subscriber.session
        first = wire.opened(session, standing, heartbeat_seconds=self._heartbeat_seconds)
        await write(encode_event(first, event="attached", identifier=str(standing.cursor)))
        while not stay.has_left:
            if subscriber.has_more:
                try:
                    records = await subscriber.pull()
                except Resync as resync:
                    told = wire.resync(session, resync.reason)
                    await write(encode_event(told, event="resync", identifier=str(_BEGINNING)))
                    return
                for data in in_pieces(_event(session, record) for record in records):
                    await write(data)
                self._note_read(attached, records)
            elif stay.is_over:
                return
            elif not await pulse.wait():
                await write(_HEARTBEAT)

    async def _poll(self, request: web.Request, session: SessionId) -> web.StreamResponse:
        after = place_asked(request)
        wait_seconds = wait_asked(request)
        woken = asyncio.Event()
        stay = _Stay(POLL_CARRIER, woken.set)
        try:
            with self._connections.hold(stay):
                attached, records = await self._wait(session, after, wait_seconds, woken, stay)
        finally:
            stay.ended()
        standing = attached.standing
        if records:
            cursor = records[-1].cursor
            standing = replace(standing, cursor=cursor, last=max(standing.last, cursor.offset))
        response = answered(wire.polled(session, standing, records))
        with cut_when_stalled(request.transport):
            await response.prepare(request)
            await response.write_eof()
        self._note_read(attached, records)
        return response

    async def _wait(
        self,
        session: SessionId,
        after: Cursor | wire.AttachFrom,
        wait_seconds: float,
        woken: asyncio.Event,
        stay: _Stay,
    ) -> tuple[Attached, Sequence[Record]]:
        """What one poll is answered, and where it stood; its subscriber is closed."""
        deadline = asyncio.get_running_loop().time() + wait_seconds
        # A poll that waits behind a cursor is no new attach: the client has been there all the time.
        resumes = not (wait_seconds and isinstance(after, Cursor))
        lost: ResyncReason | None = None
        while True:
            attached = await self._sessions.attach(
                session, after, woken.set, carrier=POLL_CARRIER, resumes=resumes
            )
            if lost is not None:
                attached = replace(attached, standing=replace(attached.standing, resync=lost))
            try:
                until = deadline if attached.resync is None else 0.0
                return attached, await _next_records(attached.subscriber, woken, stay, until)
            except Resync as resync:
                # It starts from a complete state in the same answer, as when its cursor had been lost before.
                after, resumes, lost = wire.AttachFrom.START, False, resync.reason
            finally:
                attached.subscriber.close()

    def _note_read(self, attached: Attached, records: Sequence[Record]) -> None:
        """What was written to its end is not told once more after a reload."""
        for turn in read_to_their_end(attached.standing.turns, records):
            self._sessions.was_read_soon(attached.subscriber.session, turn)


async def _next_records(
    subscriber: Subscriber, woken: asyncio.Event, stay: _Stay, deadline: float
) -> Sequence[Record]:
    """As soon as there are some; none at the deadline, and when the node stops."""
    while True:
        woken.clear()
        if subscriber.has_more and (records := await subscriber.pull()):
            return _one_answer(records)
        if stay.is_over or asyncio.get_running_loop().time() >= deadline:
            return ()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await woken.wait()


def _one_answer(records: Sequence[Record]) -> Sequence[Record]:
    """As many as one answer holds, and at least one."""
    size = 0
    for count, record in enumerate(records, start=1):
        size += record.size
        if size >= FRAME_BYTES:
            return records[:count]
    return records


def _event(session: SessionId, record: Record) -> bytes:
    return encode_event(wire.encode_push(session, record), identifier=str(record.cursor))


def _drop(request: web.Request) -> None:
    """The peer takes nothing: end the connection at once."""
    log.info("socket.dropped", reason="too-slow")
    if request.transport is not None:
        request.transport.abort()
