"""The WebSocket wire of the AI SDK's own ``WebSocketChatTransport``, on the chat path."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from gateway.config import AbortPolicy
from gateway.core import sdkwire
from gateway.core.model import (
    By,
    Cursor,
    ErrorCode,
    RecordKind,
    Refusal,
    SessionId,
    TurnId,
    session_id,
)
from gateway.core.sendbody import read_body
from gateway.edge.chatpaths import named_client
from gateway.edge.commands import PIECE_BYTES, handed_on
from gateway.edge.replies import refusal_response
from gateway.edge.socketloop import FRAME_BYTES, SocketLoop
from gateway.hub import Resync
from gateway.sends import SendRequest

if TYPE_CHECKING:
    from aiohttp import web

    from gateway.config import Config
    from gateway.core.model import Record
    from gateway.edge.admission import OpenConnections
    from gateway.edge.chatpaths import ChatTarget
    from gateway.hub import Subscriber
    from gateway.sessions import Sessions

CARRIER = "sdk-websocket"
MAX_REQUESTS = 100
"""Requests of one socket that may be open at once; a page has a handful of chats."""

_LOST = "the answer cannot be continued here; load the chat again"


class SdkWire:
    """Serves WebSockets on a chat path.

    Args:
        config: For policies and bounds.
        sessions: The verbs.
        connections: Those that are open.
    """

    def __init__(self, config: Config, *, sessions: Sessions, connections: OpenConnections) -> None:
        self.config = config
        self.sessions = sessions
        self._connections = connections

    async def handle(self, request: web.Request, target: ChatTarget) -> web.StreamResponse:
        """Serve one socket."""
        client = named_client(request, "sdk")
        socket = SdkSocket(self, request, target.path, By(client=client))
        try:
            with self._connections.hold(socket):
                return await socket.run()
        except Refusal as refusal:
            return refusal_response(refusal)
        finally:
            socket.pulse.close()  # it ticks from the start, also for who was not let in


@dataclass(slots=True)
class _Request:
    """One send or resume, being answered."""

    session: SessionId
    turn: TurnId
    rendering: sdkwire.Rendering
    subscriber: Subscriber | None = None
    taken: deque[Record] = field(default_factory=deque)
    """Pulled, and not written yet."""


class SdkSocket(SocketLoop):
    """One client of the SDK's own transport."""

    def __init__(self, served_by: SdkWire, request: web.Request, path: str, by: By) -> None:
        super().__init__(served_by.config, request, CARRIER)
        self._config = served_by.config
        self._sessions = served_by.sessions
        self._path = path
        self._by = by
        self._requests: dict[str, _Request] = {}
        self._is_leaving = False

    # -- frames

    async def received(self, text: str) -> None:
        """Carry out one frame."""
        try:
            frame = sdkwire.parse_frame(text)
        except Refusal as refusal:
            self.bad_frame()
            request_id = sdkwire.request_id_of(text)
            if request_id is not None:
                self.reply(sdkwire.error(request_id, refusal.message))
            return
        self.good_frame()
        await self.start(self._answered(frame), "sdk-frame")

    async def _answered(self, frame: sdkwire.Frame) -> None:
        try:
            match frame:
                case sdkwire.Send():
                    await self._send(frame)
                case sdkwire.Resume():
                    await self._resume(frame)
                case sdkwire.Abort():
                    await self._abort(frame)
        except Refusal as refusal:
            self.reply(sdkwire.error(frame.requestId, refusal.message))

    async def _send(self, frame: sdkwire.Send) -> None:
        session = session_id(frame.id)
        turn = _turn_of(session, self._by.user, frame.requestId)
        body = read_body(sdkwire.send_body(frame), session_field=self._config.session_field)
        # An abort may come right behind its send, before the send is accepted.
        request = self._open_request(frame.requestId, session, turn, after=-1)
        try:
            accepted = await self._sessions.send(
                SendRequest(
                    session=session,
                    turn=turn,
                    body=body,
                    path=self._path_and_query(),
                    headers=handed_on(self.request, frame.headers, self._config),
                    by=self._by,
                    overlap=self._config.overlap,
                )
            )
            await self._follow(request, accepted.before, resumes=False)
        except Refusal:
            self._requests.pop(frame.requestId, None)
            raise

    async def _resume(self, frame: sdkwire.Resume) -> None:
        session = session_id(frame.id)
        had_some = frame.lastSequence is not None
        found = await self._sessions.newest_turn(session, had_some=had_some)
        if found is None:
            self.reply(sdkwire.no_active(frame.requestId))
            return
        turn, before = found
        after = -1 if frame.lastSequence is None else frame.lastSequence
        request = self._open_request(frame.requestId, session, turn, after=after)
        self.reply(sdkwire.start(frame.requestId))
        await self._follow(request, before)

    async def _abort(self, frame: sdkwire.Abort) -> None:
        """A Stop, or an unmounted component: the policy says which."""
        request = self._requests.pop(frame.requestId, None)
        if request is None:
            return
        self._leave(request)
        match self._config.abort:
            case AbortPolicy.CANCEL:
                await self._sessions.cancel(request.session, request.turn, self._by)
            case AbortPolicy.GRACE:
                await self._sessions.abort(request.session, request.turn, self._by)
            case AbortPolicy.DETACH:
                pass

    def _open_request(self, request_id: str, session: SessionId, turn: TurnId, *, after: int) -> _Request:
        known = self._requests.pop(request_id, None)
        if known is not None:
            self._leave(known)
        elif len(self._requests) >= MAX_REQUESTS:
            message = f"unable to serve more than {MAX_REQUESTS} requests on one socket at once"
            raise Refusal(ErrorCode.RATE_LIMITED, message)
        request = _Request(session, turn, sdkwire.Rendering(request_id, after=after))
        self._requests[request_id] = request
        return request

    async def _follow(self, request: _Request, before: Cursor, *, resumes: bool = True) -> None:
        attached = await self._sessions.attach(
            request.session, before, self.pulse.wake, carrier=CARRIER, resumes=resumes
        )
        if attached.resync is not None:
            attached.subscriber.close()
            self._finish(request)
            raise Refusal(ErrorCode.CONFLICT, _LOST)
        if self._requests.get(request.rendering.request_id) is request:
            request.subscriber = attached.subscriber
            self.pulse.wake()
        else:  # aborted, or asked for again, meanwhile
            attached.subscriber.close()

    def _path_and_query(self) -> str:
        query = self.request.rel_url.raw_query_string
        return f"{self._path}?{query}" if query else self._path

    # -- chunks

    async def gather(self) -> list[bytes]:
        """Replies, then what is new for each request."""
        frames: list[bytes] = []
        for request in list(self._requests.values()):
            if sum(map(len, frames)) >= FRAME_BYTES:
                break
            frames += await self._news(request)
        if self._is_leaving and not self._requests:
            self.leave_in(0.0)
        return [*self.take_replies(), *frames]

    async def _news(self, request: _Request) -> list[bytes]:
        """A piece of what is new for a request: as a client takes it, and no more at once."""
        subscriber, rendering = request.subscriber, request.rendering
        if subscriber is None:
            return []
        try:
            if not request.taken and subscriber.has_more:
                request.taken.extend(await subscriber.pull())
        except Resync:
            self._finish(request)
            return [sdkwire.error(rendering.request_id, _LOST)]
        frames: list[bytes] = []
        size = 0
        while request.taken and not rendering.ended and size < PIECE_BYTES:
            record = request.taken.popleft()
            if record.turn != request.turn:
                continue
            told = rendering.frames(record)
            frames += told
            size += sum(map(len, told))
            if record.kind is RecordKind.TURN_END:
                self.when_written(partial(self._sessions.was_read_soon, request.session, request.turn))
        if rendering.ended:
            self._finish(request)
        elif not frames and subscriber.has_more:
            self.pulse.wake()  # a whole page was of other turns
        return frames

    def _finish(self, request: _Request) -> None:
        if self._requests.get(request.rendering.request_id) is request:
            del self._requests[request.rendering.request_id]
        self._leave(request)

    @staticmethod
    def _leave(request: _Request) -> None:
        if request.subscriber is not None:
            request.subscriber.close()
            request.subscriber = None

    def heartbeat(self) -> None:
        """The ping is enough: the SDK knows no other sign of life."""

    def leave(self, seconds: float) -> None:
        """Close it once nothing is being answered.

        Not at a moment of its own: this client connects again when it has something to send, and not before.
        What it sends here meanwhile is refused, and its page shows that; so the sooner the better.
        """
        del seconds
        self._is_leaving = True
        self.pulse.wake()

    def closed(self) -> None:
        """The client is gone: a detach."""
        for request in self._requests.values():
            self._leave(request)
        self._requests.clear()


def _turn_of(session: SessionId, user: str, request_id: str) -> TurnId:
    """The turn of a request: the same when the same frame comes again."""
    digest = hashlib.sha256(f"{session}\0{user}\0{request_id}".encode("utf-8", "surrogatepass"))
    return TurnId(f"sdk-{digest.hexdigest()[:32]}")
