"""The session protocol on a WebSocket: one socket, many sessions."""

from __future__ import annotations

from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.core import wire
from gateway.core.model import By, ErrorCode, Refusal, SessionId, bad_request, session_id
from gateway.edge.commands import PIECE_BYTES, client_of, in_pieces, read_to_their_end, wanted_place
from gateway.edge.replies import refusal_response
from gateway.edge.socketloop import FRAME_BYTES, SocketLoop
from gateway.hub import Resync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.config import Config
    from gateway.core.model import Record
    from gateway.edge.admission import OpenConnections
    from gateway.edge.commands import Commands
    from gateway.hub import Subscriber
    from gateway.sessions import Attached, Sessions

CARRIER = "websocket"
MAX_ATTACHED = 1000
"""Sessions that one socket may be attached to."""

LEAVE_SECONDS = 2.0
"""How much later than it was told a client is made to go: its clock is another, and its network slow."""


class SessionWire:
    """Serves ``GET /gateway/v1/ws``.

    Args:
        config: For policies and bounds.
        sessions: The verbs.
        commands: Those that other carriers have as well.
        node: Told in ``hello``.
        connections: Those that are open.
    """

    def __init__(
        self,
        config: Config,
        *,
        sessions: Sessions,
        commands: Commands,
        node: str,
        connections: OpenConnections,
    ) -> None:
        self.config = config
        self.sessions = sessions
        self.commands = commands
        self.node = node
        self._connections = connections

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one socket."""
        try:
            client = client_of(request)
            if not web.WebSocketResponse(protocols=(wire.SUBPROTOCOL,)).can_prepare(request):
                raise bad_request("unable to serve this URL without a WebSocket upgrade")
            offered = request.headers.get("Sec-WebSocket-Protocol")
            if offered is not None and wire.SUBPROTOCOL not in [name.strip() for name in offered.split(",")]:
                raise bad_request(f"unable to agree on a subprotocol; offer {wire.SUBPROTOCOL}")
            socket = SessionSocket(self, request, By(client=client))
            try:
                with self._connections.hold(socket):
                    return await socket.run()
            finally:
                socket.pulse.close()  # it ticks from the start, also for who was not let in
        except Refusal as refusal:
            return refusal_response(refusal)


class SessionSocket(SocketLoop):
    """One client of the session protocol."""

    def __init__(self, served_by: SessionWire, request: web.Request, by: By) -> None:
        super().__init__(served_by.config, request, CARRIER, (wire.SUBPROTOCOL,))
        self._wire = served_by
        self._sessions = served_by.sessions
        self._by = by
        self._attached: dict[SessionId, Attached] = {}
        self._sending: Counter[str] = Counter()
        self._left: set[str] = set()
        """Detached from while a send was under way, which must not attach them again."""
        self._taken: list[tuple[Subscriber, deque[Record]]] = []
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
                    self.reply(await self._wire.commands.cancel(command, self._by))
                case wire.Ping():
                    self.reply(wire.pong(command.id))
        except Refusal as refusal:
            self.reply(wire.refused(command.id, refusal))

    async def _attach(self, command: wire.Attach) -> None:
        session = session_id(command.session)
        after = wanted_place(command.after, command.start)
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
        self.reply(wire.attached(command.id, session, attached.standing))

    def _detach(self, session: SessionId) -> None:
        attached = self._attached.pop(session, None)
        if attached is not None:
            attached.subscriber.close()
            self._taken = [(owner, rest) for owner, rest in self._taken if owner is not attached.subscriber]

    async def _send(self, command: wire.Send) -> None:
        # As long as the session is in `_sending`, no record of it goes out: the reply comes first.
        accepted = await self._wire.commands.send(self.request, command, self._by, self.reply)
        session = accepted.session
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

    # -- pushes

    async def gather(self) -> list[bytes]:
        """Replies, then what is new of each session, as frames of lines."""
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
                self._taken.append((subscriber, deque(records)))
                size += sum(record.size for record in records)
        return list(in_pieces([*self.take_replies(), *lost, *self._lines()], b"\n"))

    def _is_attached(self, session: SessionId, subscriber: Subscriber) -> bool:
        attached = self._attached.get(session)
        return attached is not None and attached.subscriber is subscriber

    def _lines(self) -> list[bytes]:
        """A piece of the records taken, but for sessions whose send is not answered yet.

        Encoded piece by piece: a client that takes nothing holds one piece, and the records it stands for.
        """
        lines: list[bytes] = []
        size = 0
        for subscriber, records in self._taken:
            session = subscriber.session
            written = []
            while records and size < PIECE_BYTES and session not in self._sending:
                lines.append(wire.encode_push(session, records[0]))
                size += len(lines[-1])
                written.append(records.popleft())
            self._note_read(session, written)
        self._taken = [(subscriber, records) for subscriber, records in self._taken if records]
        return lines

    def _note_read(self, session: SessionId, records: Sequence[Record]) -> None:
        """What has come to its end is noted when it is handed to the socket."""
        attached = self._attached.get(session)
        turns = () if attached is None else attached.standing.turns
        for turn in read_to_their_end(turns, records):
            self.when_written(partial(self._sessions.was_read_soon, session, turn))

    def heartbeat(self) -> bytes:
        """After a silence."""
        return wire.HEARTBEAT

    def leave(self, seconds: float) -> None:
        """Tell the client when to go, and close what has not gone by then."""
        self.reply(wire.goaway(seconds))
        self.leave_in(seconds + LEAVE_SECONDS)

    def closed(self) -> None:
        """The client is gone: detach from everything."""
        for session in list(self._attached):
            self._detach(session)
