"""Link: a unix socket in front of the real Valkey, which loses replies, or holds them back until released.

A call is told by bytes that it holds: a word of its payload, or the SHA-1 of its script::

    async with Link(valkey_url, tmp_path) as link:
        held = link.hold(b"a word")
        ...                       # something that asks the store, by link.url
        await held.reached()      # the store has answered, and nobody knows it
        held.release()
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

from gateway.store import load_script

if TYPE_CHECKING:
    from pathlib import Path

WAIT_SECONDS = 15.0

READ_BYTES = 1024 * 1024
"""A call is expected to come in one read; those of tests are far smaller."""


class Fault:
    """What befalls the replies of a connection, from a call on that holds certain bytes.

    Attributes:
        holding: Those bytes.
        times: How many calls it is still to befall; the same connection counts once.
        loses: Whether the replies are lost; otherwise they are held back until :meth:`release`.
    """

    def __init__(self, holding: bytes, times: int, *, loses: bool) -> None:
        self.holding = holding
        self.times = times
        self.loses = loses
        self._reached = 0
        self._changed = asyncio.Condition()
        self._released = asyncio.Event()

    async def reached(self, times: int = 1) -> None:
        """Wait until the store has answered that many such calls, and the answers were not passed on."""
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self._reached >= times)

    def release(self) -> None:
        """Pass on what is held back."""
        self._released.set()

    async def befall(self) -> bool:
        """A reply has come; returns whether to pass it on, when its time has come."""
        async with self._changed:
            self._reached += 1
            self._changed.notify_all()
        if self.loses:
            return False
        await self._released.wait()
        return True


class Link:
    """A proxy that understands nothing of what it passes on.

    Args:
        store_url: ``unix://...``, as of :func:`tests.support.valkey.running_valkey`.
        folder: Where its own socket is put.
    """

    def __init__(self, store_url: str, folder: Path) -> None:
        self._store = store_url.removeprefix("unix://")
        self._path = str(folder / "link.sock")
        self._faults: list[Fault] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """For GATEWAY_REDIS_URL."""
        return f"unix://{self._path}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose(self, holding: bytes, *, times: int = 1) -> Fault:
        """Carry such calls out, and never say so: their connections are silent from then on."""
        return self._befalls(Fault(holding, times, loses=True))

    def hold(self, holding: bytes) -> Fault:
        """Carry one such call out, and keep its reply, and those behind it, until it is released."""
        return self._befalls(Fault(holding, 1, loses=False))

    def _befalls(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        store_reader, store_writer = await asyncio.open_unix_connection(self._store)
        befallen: list[Fault] = []
        ways = {
            asyncio.create_task(self._pass_calls(reader, store_writer, befallen), name="link-calls"),
            asyncio.create_task(_pass_replies(store_reader, writer, befallen), name="link-replies"),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._tasks.discard(task)
            for end in (writer, store_writer):
                end.close()
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()

    async def _pass_calls(
        self, reader: asyncio.StreamReader, store: asyncio.StreamWriter, befallen: list[Fault]
    ) -> None:
        while data := await reader.read(READ_BYTES):
            for fault in self._faults:
                if fault.times and fault not in befallen and fault.holding in data:
                    fault.times -= 1
                    befallen.append(fault)  # before the store can answer
            store.write(data)


async def _pass_replies(
    store: asyncio.StreamReader, writer: asyncio.StreamWriter, befallen: list[Fault]
) -> None:
    while data := await store.read(READ_BYTES):
        passed = [await fault.befall() for fault in befallen]
        if all(passed):
            writer.write(data)


def script(name: str) -> bytes:
    """What a call of a script holds."""
    return load_script(name).sha.encode()
