"""One connection to Redis: commands leave packed, replies come back parsed, in the order of the commands.

redis-py makes the connection, for it knows addresses, TLS, passwords and databases. What it would do from
then on (a stream, a coroutine for each reply) costs more than the server does: so its transport is given
another protocol, and its parser's C core is used without it.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, Protocol, cast

import hiredis
from hiredis import ReplyError
from redis.exceptions import ConnectionError as ConnectionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio.connection import AbstractConnection

__all__ = ["Argument", "Connector", "Pipeline", "ReplyError", "abandon", "pack", "packed"]

Argument = bytes | str | int

_NOT_YET = object()


class Connector(Protocol):
    """What makes connections: a pool of redis-py, of which no more is used."""

    def make_connection(self) -> Any:
        """One that is not connected yet."""


class Pipeline(asyncio.Protocol):
    """A connection that is open, and whose replies go to a callback.

    It does not count commands or replies, and has no deadline: that is its owner's. Nor does it hold writes
    back when the peer reads slowly: its owner writes no more before all replies have come, so that what the
    transport keeps is never more than was given to one :meth:`write`.

    Args:
        connection: Made and authenticated by redis-py. Kept, for its stream closes the transport when it is
            collected.
        transport: The connection's.
        on_replies: Gets what was read at once: ``bytes``, ``int``, lists of them, and :class:`ReplyError`.
        on_lost: Told that it is of no more use. The owner closes it then, and is told no more.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        transport: asyncio.Transport,
        on_replies: Callable[[list[Any]], None],
        on_lost: Callable[[Exception], None],
    ) -> None:
        self._connection = connection
        self._transport = transport
        self._on_replies = on_replies
        self._on_lost = on_lost
        self._reader = hiredis.Reader(notEnoughData=_NOT_YET)
        self._is_over = False

    @classmethod
    async def connect(
        cls,
        connector: Connector,
        on_replies: Callable[[list[Any]], None],
        on_lost: Callable[[Exception], None],
    ) -> Pipeline:
        """Make a connection. The caller sets the deadline, and closes what it gets.

        Raises:
            redis.exceptions.RedisError: It cannot be made, or the server refused it.
            OSError: Likewise.
        """
        connection = cast("AbstractConnection", connector.make_connection())
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            transport = await _quiet_transport(connection)
        except BaseException:
            abandon(connection)
            raise
        pipeline = cls(connection, transport, on_replies, on_lost)
        transport.set_protocol(pipeline)
        return pipeline

    @property
    def is_closing(self) -> bool:
        """The peer went away, or :meth:`close` was called: what is written now is lost."""
        return self._is_over or self._transport.is_closing()

    def write(self, parts: Sequence[bytes]) -> None:
        """Send packed commands, all in one write as far as the peer takes it."""
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    def close(self) -> None:
        """Close without a word: what is still unwritten must not be kept, or written later."""
        self._is_over = True
        abandon(self._connection)

    def data_received(self, data: bytes) -> None:
        """Parse; asyncio calls it."""
        if self._is_over:
            return
        replies = []
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOT_YET:
                replies.append(reply)
        except hiredis.HiredisError as error:
            self.connection_lost(error)
        else:
            if replies:
                self._on_replies(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner; asyncio calls it."""
        if not self._is_over:
            self._on_lost(exc or ConnectionFailed("the server closed the connection"))


def _transport_of(connection: AbstractConnection) -> asyncio.Transport | None:
    writer = connection._writer  # noqa: SLF001 - redis-py has no other way to its transport
    return None if writer is None else cast("asyncio.Transport", writer.transport)


async def _quiet_transport(connection: AbstractConnection) -> asyncio.Transport:
    """The transport of a new connection, once nothing is left in the protocol that goes."""
    transport = _transport_of(connection)
    # An end that came already was told to the old protocol, and will not be told again.
    if transport is None or transport.is_closing() or await connection.can_read():
        raise ConnectionFailed("the server closed a new connection")
    return transport


def abandon(connection: AbstractConnection) -> None:
    """Close a connection of redis-py without a word.

    Abort first: redis-py would write the rest, and wait for a peer that may be frozen.
    """
    transport = _transport_of(connection)
    if transport is not None:
        transport.abort()
    connection._close()  # type: ignore[no-untyped-call]  # noqa: SLF001 - disconnect() is a coroutine


def pack(count: int, command: bytes, arguments: Sequence[Argument]) -> list[bytes]:
    """A command as the protocol writes it; large arguments are not copied.

    Args:
        count: Of the arguments, and of what stands in ``command`` behind its name.
        command: Its name and its first arguments, packed.
        arguments: The rest.
    """
    head: list[bytes] = [b"*%d\r\n" % (1 + count), command]
    parts: list[bytes] = []
    for argument in arguments:
        if not isinstance(argument, bytes):
            head.append(packed(argument))
        elif len(argument) <= 16_384:  # noqa: PLR2004 - below it a copy is cheaper than a part
            head.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
        else:
            head.append(b"$%d\r\n" % len(argument))
            parts += (b"".join(head), argument)
            head = [b"\r\n"]
    parts.append(b"".join(head))
    return parts


@functools.lru_cache(maxsize=8192)
def packed(argument: str | int) -> bytes:
    """Kept: a turn sends the same ids and words with each append. What may be long comes as bytes."""
    data = str(argument).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)
