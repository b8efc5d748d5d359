"""The sockets of a network: none of them blocks, and none is closed without saying how."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 64 * 1024

DRAIN_READS = 64
"""A socket closed with bytes unread would send a reset instead of what was written."""


def resolve(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def new_socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setblocking(False)  # noqa: FBT003 - positional only
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def close_socket(end: socket.socket, *, reset: bool) -> None:
    with contextlib.suppress(OSError):  # its peer may have gone first
        if reset:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            end.shutdown(socket.SHUT_WR)
            for _ in range(DRAIN_READS):
                if not end.recv(READ_BYTES):
                    break
    end.close()


async def take_each(listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
    """Accept connections, until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        waiting = loop.create_future()
        loop.add_reader(listener.fileno(), resolve, waiting)
        try:
            await waiting
        finally:
            loop.remove_reader(listener.fileno())
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            continue  # it has gone again
        # In the same step: a task that is ended in between would lose it.
        take(client)
