"""The verbs: send, cancel, attach, and the answer of one turn."""

from __future__ import annotations

import re
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from yarl import URL

from gateway.client.dialogue import Dialogue
from gateway.client.errors import GaveUpError, TurnEndedError
from gateway.client.records import Record, Records
from gateway.client.timing import Timing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

MAX_WAITING_BYTES = 4 * 1024 * 1024

_CLIENT_ID = re.compile(r"[!-~]{1,128}")
_CLIENT_ID_RULE = "it is 1 to 128 printable ASCII characters without space"


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that was accepted.

    Attributes:
        session: Of which session.
        id: Its id.
        cursor: Just before its first record. ``None`` where only the id is known: it is looked for from the
            first record kept on, and waited for if it is not there.
        duplicate: Whether it had been accepted before.
    """

    session: str
    id: str
    cursor: str | None = None
    duplicate: bool = False


class GatewayClient:
    """Speaks for one client over one connection: an async context manager.

    It connects when there is something to say, and again after a loss for as long as somebody waits for an
    answer or a record. Sessions are independent: one whose records nobody takes does not hold up the others.

    Args:
        url: The gateway's base URL.
        client: Who this is, told to everybody as ``by.client``; else an id is minted.
        headers: For the handshake.
        timing: How patient it is.
        max_waiting_bytes: JSON of one session's records that may wait to be taken (:class:`Records`).
    """

    def __init__(
        self,
        url: str,
        *,
        client: str | None = None,
        headers: Mapping[str, str] | None = None,
        timing: Timing | None = None,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        if URL(url).scheme not in {"http", "https", "ws", "wss"}:
            raise ValueError(f"unable to use {url!r}; name the gateway as http://host:port")
        if client is not None and not _CLIENT_ID.fullmatch(client):
            raise ValueError(f"unable to use the client id {client!r:.60}; {_CLIENT_ID_RULE}")
        self.client = client or f"python-{uuid.uuid4()}"
        self._max_waiting_bytes = max_waiting_bytes
        socket = (URL(url) / "gateway" / "v1" / "ws").with_query(client=self.client)
        self._dialogue = Dialogue(str(socket), headers=headers or {}, timing=timing or Timing())

    async def __aenter__(self) -> Self:
        self._dialogue.connection.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._dialogue.close()

    async def send(
        self,
        session: str,
        body: Mapping[str, Any],
        *,
        turn: str | None = None,
        path: str | None = None,
        overlap: Literal["parallel", "reject", "interrupt"] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Turn:
        """Ask for a turn; returns when it is journalled, before the backend answers.

        Args:
            session: The chat's id.
            body: What the backend gets.
            turn: Its id, else one is minted. A send that may have been accepted is repeated with the same id.
            path: Which of the gateway's chat paths; else its first.
            overlap: What to do when another turn runs; else what the gateway is set to.
            headers: For the backend; the gateway hands on those that it is set to.

        Raises:
            RefusedError: Nothing was sent to the backend.
            GaveUpError: It was not answered, and may have been accepted; the error's note names the turn.
            ClosedError: The gateway does not want this client.
        """
        turn = turn or str(uuid.uuid4())
        optional = {"path": path, "overlap": overlap, "headers": dict(headers) if headers else None}
        command = {"type": "send", "session": session, "turn": turn, "body": dict(body)}
        command |= {name: value for name, value in optional.items() if value is not None}
        try:
            reply = await self._dialogue.ask(command)
        except GaveUpError as error:
            error.add_note(f"repeat it with turn={turn!r}")
            raise
        return Turn(session, turn, reply["cursor"], duplicate=reply.get("duplicate", False))

    async def cancel(self, session: str, turn: str | None = None) -> dict[str, str]:
        """End a turn, or all that run when the gateway hears it; returns each turn's result.

        Raises:
            RefusedError, GaveUpError, ClosedError: As of :meth:`send`.
        """
        command = {"type": "cancel", "session": session}
        reply = await self._dialogue.ask(command if turn is None else {**command, "turn": turn})
        return {told["turn"]: told["result"] for told in reply["turns"]}

    @asynccontextmanager
    async def attach(
        self, session: str, *, after: str | None = None, start: Literal["start", "running"] = "start"
    ) -> AsyncIterator[Records]:
        """Receive a session's records for as long as the context is open.

        A client has one reader of a session: the one that attached last. The one before gets a
        :class:`DetachedError`.

        Args:
            session: The chat's id; one that nobody has sent to yet is empty.
            after: The cursor of the last record had.
            start: Without ``after``: from the first record kept, or from the oldest running turn.

        Raises:
            ResyncError: The place after the cursor is gone.
            RefusedError, GaveUpError, ClosedError: As of :meth:`send`.
        """

        async def ask(reader: Records) -> None:
            place = {"from": start} if reader.cursor is None else {"after": reader.cursor}
            await self._dialogue.ask({"type": "attach", "session": session, **place}, reader=reader)

        records = Records(session, after, ask=ask, max_bytes=self._max_waiting_bytes)
        self._dialogue.add(records)
        try:
            await records.begin()
            yield records
        finally:
            self._dialogue.remove(records)

    async def answer(self, turn: Turn) -> AsyncGenerator[Record, None]:
        """The chunks of a turn, to its end. It is the session's reader meanwhile (:meth:`attach`).

        Raises:
            TurnEndedError: It did not complete.
            ResyncError: Its records are gone, or some of them.
            RefusedError, GaveUpError, ClosedError, DetachedError: As of :meth:`attach`.
        """
        async with self.attach(turn.session, after=turn.cursor) as records:
            async for record in records:
                if record.turn != turn.id:
                    continue
                if record.kind == "chunk":
                    yield record
                elif record.kind == "turn-end":
                    if record.reason != "complete":
                        raise TurnEndedError(record)
                    return
