"""What is said on a connection: commands until their replies, and records to their readers.

A command is kept until its reply, and written again on each new connection. That is safe for each of them:
a send names its turn, a cancel of what has ended says so, and an attach takes the place that it names.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.client.connection import Connection, Owner
from gateway.client.errors import DetachedError, GatewayClientError, GaveUpError, RefusedError, ResyncError
from gateway.client.records import Record, Records

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.client.timing import Timing

log = logging.getLogger(__name__)

RECORDS = frozenset({"turn-start", "chunk", "turn-end"})


@dataclass(frozen=True, slots=True)
class _Command:
    """A command without its reply.

    Attributes:
        frame: As it is written.
        session: Which it is about.
        attaches: Whether the gateway attaches us by it, also when nobody here reads the session.
        reader: Who is placed by its reply.
        reply: Resolves with it.
    """

    frame: str
    session: str
    attaches: bool
    reader: Records | None
    reply: asyncio.Future[dict[str, Any]]


class Dialogue(Owner):
    """One client's side. Open it, close it.

    Args:
        url: Of the socket.
        headers: For the handshake.
        timing: How patient.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str], timing: Timing) -> None:
        self.connection = Connection(url, headers=headers, timing=timing, owner=self)
        self._timing = timing
        self._ids = itertools.count(1)
        self._unanswered: dict[int, _Command] = {}
        self._readers: dict[str, Records] = {}

    async def close(self) -> None:
        """Leave; whoever still waits is told."""
        self.failed(DetachedError("unable to go on; this client was closed"))
        await self.connection.close()

    # -- commands

    async def ask(self, command: dict[str, Any], *, reader: Records | None = None) -> dict[str, Any]:
        """Give a command; returns its reply, across any number of connections.

        Args:
            command: All of it but its id.
            reader: Who is placed by the reply.

        Raises:
            RefusedError: It was refused as what no patience makes right, or as ``busy``.
            GaveUpError: No reply in ``give_up_seconds``.
            GatewayClientError: There will be no reply.
        """
        last: Exception | None = None
        try:
            async with asyncio.timeout(self._timing.give_up_seconds):
                for attempt in itertools.count():
                    try:
                        return await self._once(command, reader)
                    except RefusedError as refused:
                        if not refused.retryable or refused.code == "busy":
                            raise
                        last = refused
                        if refused.code == "draining" and self.connection.is_leaving:
                            continue  # another node takes it
                        delay = self._timing.backoff(attempt) + (refused.retry_after_seconds or 0)
                    await asyncio.sleep(delay)
        except TimeoutError:
            last = last or self.connection.failure
        message = f"unable to {command['type']} within {self._timing.give_up_seconds} s"
        raise GaveUpError(f"{message}; {last or 'the gateway did not answer'}") from last

    async def _once(self, members: dict[str, Any], reader: Records | None) -> dict[str, Any]:
        if reader is not None:
            reader.check()  # one that was followed by another must not move the place of that
        identifier = next(self._ids)
        command = _Command(
            frame=json.dumps({**members, "id": identifier}),
            session=members["session"],
            attaches=members["type"] == "send",
            reader=reader,
            reply=asyncio.get_running_loop().create_future(),
        )
        self._unanswered[identifier] = command
        try:
            self.connection.start()
            for frame in self._frames(command):
                self.connection.write(frame)
            return await command.reply
        finally:
            self._unanswered.pop(identifier, None)

    def _frames(self, command: _Command) -> list[str]:
        """A send attaches its sender; where nobody reads the session, its records are not wanted."""
        if command.attaches and command.session not in self._readers:
            return [command.frame, self._detaching(command.session)]
        return [command.frame]

    def _detaching(self, session: str) -> str:
        return json.dumps({"type": "detach", "id": next(self._ids), "session": session})

    # -- readers

    def add(self, reader: Records) -> None:
        """A session's records go to this reader from here on; the one before gets no more."""
        if (older := self._readers.get(reader.session)) is not None:
            why = f"unable to read {reader.session!r} on; this client attached to it once more"
            older.fail(DetachedError(why))
        self._readers[reader.session] = reader

    def remove(self, reader: Records) -> None:
        """It wants no more."""
        if self._readers.get(reader.session) is reader:
            del self._readers[reader.session]
            self.connection.write(self._detaching(reader.session))

    # -- what the connection tells

    def is_waiting(self) -> bool:
        """A reader that wants more has a command unanswered as well: its attach."""
        return bool(self._unanswered)

    def opened(self) -> list[str]:
        """Everything that is unanswered, in the order in which it was asked."""
        return [frame for command in self._unanswered.values() for frame in self._frames(command)]

    def received(self, line: dict[str, Any], size: int) -> None:
        """A reply or a push."""
        if line["type"] in RECORDS:
            self._record(Record(line), size)
        elif line["type"] == "resync":
            if (reader := self._readers.get(line["session"])) is not None:
                reader.fail(ResyncError(line["session"], line["reason"]))
        elif "id" in line:
            if (command := self._unanswered.pop(line["id"], None)) is not None:
                self._reply(command, line)
        elif line["type"] == "error":
            log.error("the gateway could not read a command: %s", line["message"])

    def _record(self, record: Record, size: int) -> None:
        reader = self._readers.get(record.session)
        if reader is not None and reader.take(record, size):
            self.connection.write(self._detaching(record.session))

    def _reply(self, command: _Command, reply: dict[str, Any]) -> None:
        # At once, and not when the reader's task comes to run: its records are in the same frame.
        if command.reader is not None and reply["type"] == "attached":
            command.reader.placed(reply)
        if command.reply.done():
            return  # who asked has left
        if reply["type"] == "error":
            command.reply.set_exception(RefusedError(reply))
        else:
            command.reply.set_result(reply)

    def lost(self) -> None:
        """Readers attach again when they have taken what came."""
        for reader in self._readers.values():
            reader.lost()

    def failed(self, error: GatewayClientError) -> None:
        """Nobody gets anything more."""
        for command in self._unanswered.values():
            if not command.reply.done():
                command.reply.set_exception(error)
        for reader in self._readers.values():
            reader.fail(error)
