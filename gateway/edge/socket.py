"""The session protocol on a WebSocket: one socket, many sessions."""

from __future__ import annotations

import secrets
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.core import wire
from gateway.core.model import (
    By,
    ClientId,
    Cursor,
    ErrorCode,
    Overlap,
    RecordKind,
    Refusal,
    SessionId,
    bad_request,
    client_id,
    session_id,
    turn_id,
)
from gateway.core.sendbody import read_body, with_session
from gateway.edge.headers import SOCKET_HEADERS, socket_headers, upstream_request_headers
from gateway.edge.replies import refusal_response
from gateway.edge.socketloop import FRAME_BYTES, OpenSockets, SocketLoop
from gateway.hub import Resync
from gateway.sends import Accepted, SendRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multidict import CIMultiDict

    from gateway.config import Config
    from gateway.core.model import Record
    from gateway.edge.chatpaths import ChatPaths
    from gateway.hub import Subscriber
    from gateway.sessions import Attached, Sessions

CARRIER = "websocket"
MAX_ATTACHED = 1000
"""Sessions that one socket may be attached to."""


class SessionWire:
    """Serves ``GET /gateway/v1/ws``.

    Args:
        config: For policies and bounds.
        sessions: The verbs.
        paths: Which chat paths a send may name.
        node: Told in ``hello``.
        sockets: Where the node finds its open ones.
    """

    def __init__(
        self, config: Config, *, sessions: Sessions, paths: ChatPaths, node: str, sockets: OpenSockets
    ) -> None:
        self.config = config
        self.sessions = sessions
        self.paths = paths
        self.node = node
        self._sockets = sockets

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one socket."""
        try:
            named = request.query.get("client")
            client = ClientId(f"c-{secrets.token_hex(8)}") if named is None else client_id(named)
            if not web.WebSocketResponse(protocols=(wire.SUBPROTOCOL,)).can_prepare(request):
                raise bad_request("unable to serve this URL without a WebSocket upgrade")
            offered = request.headers.get("Sec-WebSocket-Protocol")
            if offered is not None and wire.SUBPROTOCOL not in [name.strip() for name in offered.split(",")]:
                raise bad_request(f"unable to agree on a subprotocol; offer {wire.SUBPROTOCOL}")
        except Refusal as refusal:
            return refusal_response(refusal)
        socket = SessionSocket(self, request, By(client=client))
        return await self._sockets.serve(socket)


class SessionSocket(SocketLoop):
    """One client of the session protocol."""

    def __init__(self, served_by: SessionWire, request: web.Request, by: By) -> None:
        super().__init__(served_by.config, request, (wire.SUBPROTOCOL,))
        self._wire = served_by
        self._sessions = served_by.sessions
        self._by = by
        self._attached: dict[SessionId, Attached] = {}
        self._sending: Counter[str] = Counter()
        self._left: set[str] = set()
        """Detached from while a send was under way, which must not attach them again."""
        self._taken: list[tuple[Subscriber, Sequence[Record]]] = []
        self.reply(
            wire.hello(
                node=served_by.node, client=by.client, heartbeat_seconds=served_by.config.heartbeat_seconds
            )
        )

    # -- commands

    async def received(self, text: str) -> None:
        """Carry out one command."""
        try:
            command = wire.parse_command(text)
        except wire.BadCommand as refusal:
            self.bad_frame()
            self.reply(wire.refused(refusal.id, refusal))
            return
        self.good_frame()
        match command:
            # These two take their time, and what comes behind them need not wait.
            case wire.Send():
                # Counted from here on: a detach right behind it comes before the task's first step.
                self._sending[command.session] += 1
                self._left.discard(command.session)
                await self.start(self._answered_send(command), "send")
            case wire.Cancel():
                await self.start(self._answered(command), "cancel")
            case _:
                await self._answered(command)

    async def _answered_send(self, command: wire.Send) -> None:
        try:
            await self._answered(command)
        finally:
            self._sending[command.session] -= 1
            if not self._sending[command.session]:
                del self._sending[command.session]
                self._left.discard(command.session)
            self.pulse.wake()

    async def _answered(self, command: wire.Command) -> None:
        try:
            match command:
                case wire.Attach():
                    await self._attach(command)
                case wire.Detach():
                    session = session_id(command.session)
                    self._detach(session)
                    if session in self._sending:
                        self._left.add(session)
                    self.reply(wire.ok(command.id))
                case wire.Send():
                    await self._send(command)
                case wire.Cancel():
                    await self._cancel(command)
                case wire.Ping():
                    self.reply(wire.pong(command.id))
        except Refusal as refusal:
            self.reply(wire.refused(command.id, refusal))

    async def _attach(self, command: wire.Attach) -> None:
        session = session_id(command.session)
        after = None if command.after is None else Cursor.parse(command.after)
        self._left.discard(session)
        known = self._attached.get(session)
        if known is None:
            if len(self._attached) >= MAX_ATTACHED:
                message = f"unable to attach to more than {MAX_ATTACHED} sessions on one socket; detach some"
                raise Refusal(ErrorCode.RATE_LIMITED, message)
            attached = await self._sessions.attach(session, after, self.pulse.wake, carrier=CARRIER)
            self._detach(session)  # a send may have attached meanwhile
        else:
            attached = await self._sessions.place(known.subscriber, after)
            self._taken = [
                (owner, records) for owner, records in self._taken if owner is not known.subscriber
            ]
        self._attached[session] = attached
        self.reply(wire.attached(command.id, session, attached.cursor, attached.turns, attached.resync))

    def _detach(self, session: SessionId) -> None:
        attached = self._attached.pop(session, None)
        if attached is not None:
            attached.subscriber.close()
            self._taken = [(owner, rest) for owner, rest in self._taken if owner is not attached.subscriber]

    async def _send(self, command: wire.Send) -> None:
        session = session_id(command.session)
        config = self._wire.config
        raw = with_session(bytes(command.body), session=session, session_field=config.session_field)
        try:
            overlap = config.overlap if command.overlap is None else Overlap(command.overlap)
        except ValueError:
            known = ", ".join(Overlap)
            raise bad_request(
                f"unable to send with overlap {command.overlap!r:.60}; known are {known}"
            ) from None
        request = SendRequest(
            session=session,
            turn=turn_id(command.turn),
            body=read_body(raw, session_field=config.session_field),
            path=self._wire.paths.chosen(command.path),
            headers=handed_on(self.request, {}, config),
            by=self._by,
            overlap=overlap,
        )
        # As long as the session is in `_sending`, no record of it goes out: the reply comes first.
        accepted = await self._sessions.send(request, accepted=lambda done: self._accepted(command, done))
        if session in self._attached or session in self._left:
            return
        attached = await self._sessions.attach(
            session, accepted.before, self.pulse.wake, carrier=CARRIER, resumes=False
        )
        if session in self._attached or session in self._left:  # another command was quicker
            attached.subscriber.close()
        elif attached.resync is not None:  # a send of old, whose journal is gone
            attached.subscriber.close()
            self.reply(wire.resync(session, attached.resync))
        else:
            self._attached[session] = attached

    def _accepted(self, command: wire.Send, accepted: Accepted) -> None:
        self.reply(
            wire.accepted(
                command.id,
                accepted.session,
                accepted.turn,
                accepted.before,
                duplicate=accepted.duplicate,
            )
        )

    async def _cancel(self, command: wire.Cancel) -> None:
        turn = None if command.turn is None else turn_id(command.turn)
        results = await self._sessions.cancel(session_id(command.session), turn, self._by)
        self.reply(wire.cancelled(command.id, results))

    # -- pushes

    async def gather(self) -> list[bytes]:
        """Replies, then what is new of each session, as one frame of lines."""
        size = sum(record.size for _, records in self._taken for record in records)
        lost: list[bytes] = []
        waiting = {owner for owner, _ in self._taken}
        for session, attached in list(self._attached.items()):
            subscriber = attached.subscriber
            if size >= FRAME_BYTES or session in self._sending or subscriber in waiting:
                continue
            if not subscriber.has_more:
                continue
            try:
                records = await subscriber.pull()
            except Resync as resync:
                if self._is_attached(session, subscriber):
                    self._detach(session)
                    lost.append(wire.resync(session, resync.reason))
                continue
            # A detach may have been answered while the journal was read.
            if records and self._is_attached(session, subscriber):
                self._taken.append((subscriber, records))
                size += sum(record.size for record in records)
        lines = [*self.take_replies(), *lost, *self._lines()]
        return [b"\n".join(lines)] if lines else []

    def _is_attached(self, session: SessionId, subscriber: Subscriber) -> bool:
        attached = self._attached.get(session)
        return attached is not None and attached.subscriber is subscriber

    def _lines(self) -> list[bytes]:
        """The records taken, but for sessions whose send is not answered yet."""
        lines: list[bytes] = []
        held = []
        for subscriber, records in self._taken:
            session = subscriber.session
            if session in self._sending:
                held.append((subscriber, records))
                continue
            lines += [wire.encode_push(session, record) for record in records]
            for record in records:
                if record.kind is RecordKind.TURN_END:
                    self._read_to_its_end(session, record)
        self._taken = held
        return lines

    def _read_to_its_end(self, session: SessionId, record: Record) -> None:
        """Noted when it is handed to the socket; older turns than were told of are old news."""
        attached = self._attached.get(session)
        told = {turn.turn: turn for turn in attached.turns} if attached is not None else {}
        first_news = min((turn.offset for turn in told.values()), default=0)
        if record.offset >= first_news:
            self.when_written(partial(self._sessions.was_read_soon, session, record.turn))

    def heartbeat(self) -> bytes:
        """After a silence."""
        return wire.HEARTBEAT

    def closed(self) -> None:
        """The client is gone: detach from everything."""
        for session in list(self._attached):
            self._detach(session)


def handed_on(request: web.Request, frame: dict[str, str], config: Config) -> CIMultiDict[str]:
    """The headers of a socket's send, as the backend gets them."""
    allowed = SOCKET_HEADERS | frozenset(config.forward_headers)
    headers = upstream_request_headers(
        socket_headers(request.headers, frame, allowed),
        peer=request.remote or "",
        scheme=request.scheme,
        host=request.headers.get("Host", ""),
        ask_identity=True,
    )
    headers["Content-Type"] = "application/json"
    headers["Accept"] = "*/*"
    return headers
