"""A load balancer as small as they get: each new connection goes to the next node that accepts one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

CONNECT_SECONDS = 5.0
READ_BYTES = 64 * 1024


class Balancer:
    """Passes connections on, byte by byte, and knows nothing of HTTP.

    Attributes:
        address: Where clients connect.
        nodes: Addresses that may be tried; a test changes them as nodes come and go.
        passed: How many connections each of them has accepted.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self.nodes = deque(nodes)
        self.passed: dict[str, int] = {}
        self.address = ""
        self._passing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        try:
            await self._pass_on(reader, writer)
        finally:
            self._passing.discard(task)
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = await self._connected()
        if found is None:
            return
        node_reader, node_writer = found
        ways = [
            asyncio.create_task(_copy(reader, node_writer), name="to-node"),
            asyncio.create_task(_copy(node_reader, writer), name="to-client"),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if ways[1].done():
                with contextlib.suppress(OSError):
                    await writer.drain()
                    writer.close()  # what the node said last arrives, and then the end
                    await writer.wait_closed()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            node_writer.transport.abort()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for _ in range(len(self.nodes)):
            self.nodes.rotate(-1)
            address = self.nodes[0]
            host, _, port = address.rpartition(":")
            with contextlib.suppress(OSError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    streams = await asyncio.open_connection(host, int(port))
                self.passed[address] = self.passed.get(address, 0) + 1
                return streams
        return None


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until there is no more."""
    with contextlib.suppress(OSError):
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
