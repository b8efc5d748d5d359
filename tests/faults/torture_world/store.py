"""The store: real servers on append-only files, and what befalls them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.support.network import Network
from tests.support.valkey import free_port, server_binary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

START_SECONDS = 20.0
SYNC_SECONDS = 20.0


class Server:
    """One server, which can be ended and started again on its file."""

    def __init__(self) -> None:
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="gw-torture-"))
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *options: str) -> Self:
        """Start it, and wait until it answers."""
        self._process = await asyncio.create_subprocess_exec(
            server_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder),
            "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
            "--repl-diskless-sync-delay", "0", *options,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        await self._until(self._answers, START_SECONDS)
        return self

    async def follow(self, primary: Server) -> None:
        """Be its replica, and wait until all is copied."""
        await self.tell("REPLICAOF", "127.0.0.1", str(primary.port))
        await self._until(self._is_in_sync, SYNC_SECONDS)

    async def tell(self, *command: str) -> object:
        """Give a command; returns the answer."""
        async with Redis(port=self.port, socket_timeout=5.0) as connection:
            told: object = await connection.execute_command(*command)  # type: ignore[no-untyped-call]  # its stubs
            return told

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End it with -9."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def remove(self) -> None:
        """End it and forget its file."""
        await self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _answers(self) -> bool:
        return await self.tell("PING") in {b"PONG", True}

    async def _is_in_sync(self) -> bool:
        told = await self.tell("INFO", "replication")
        return isinstance(told, dict) and told.get("master_link_status") == "up"

    async def _until(self, holds: Callable[[], Awaitable[bool]], seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while True:
                with contextlib.suppress(RedisError, OSError):
                    if await holds():
                        return
                await asyncio.sleep(0.02)


class TortureStore:
    """A server, or a primary with a replica behind a switch of ours.

    Args:
        replicated: Whether there is a replica, so that there can be failovers.

    Attributes:
        url: For the gateways.
    """

    def __init__(self, *, replicated: bool) -> None:
        self.url = ""
        self._replicated = replicated
        self._primary = Server()
        self._replica = Server() if replicated else None
        self._switch = Network(f"127.0.0.1:{self._primary.port}")

    async def __aenter__(self) -> Self:
        await self._primary.start()
        if self._replica is None:
            self.url = f"redis://127.0.0.1:{self._primary.port}"
            return self
        await self._replica.start()
        await self._replica.follow(self._primary)
        await self._switch.__aenter__()
        self.url = f"redis://{self._switch.address}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._replicated:
            await self._switch.__aexit__()
        for server in (self._primary, self._replica):
            if server is not None:
                await server.remove()

    async def befall(self, kind: str, seconds: float) -> str:
        """Do one fault and see its end; returns more about it."""
        match kind:
            case "freeze":
                self._primary.signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    self._primary.signal(signal.SIGCONT)
            case "restart":
                await self._primary.kill()
                await asyncio.sleep(seconds)
                await self._primary.start()
            case "failover":
                return await self._fail_over(seconds)
            case "cut-normal" | "cut-pubsub":
                cut = await self._primary.tell("CLIENT", "KILL", "TYPE", kind.removeprefix("cut-"))
                return f"{cut} connections"
            case "script-flush":
                await self._primary.tell("SCRIPT", "FLUSH")
            case _:
                raise ValueError(f"unable to do {kind!r} to a store")
        return ""

    async def _fail_over(self, lost_seconds: float) -> str:
        """The replica stops to follow; what is written from then on is lost when it takes over."""
        assert self._replica is not None, "unable to fail over; there is no replica"
        old, new = self._primary, self._replica
        before = await _written(old)
        await new.tell("REPLICAOF", "NO", "ONE")
        began_at = time.monotonic()
        await asyncio.sleep(lost_seconds)
        lost = await _written(old) - before
        took = time.monotonic() - began_at
        # Its clients lose it at once and for good: nothing is acknowledged by both.
        await old.kill()
        self._switch.target = f"127.0.0.1:{new.port}"
        self._switch.cut()
        self._primary, self._replica = new, await Server().start()
        await self._replica.follow(new)
        await old.remove()
        return f"about {lost} commands of {took:.2f} s lost"


async def _written(server: Server) -> int:
    told = await server.tell("INFO", "stats")
    return int(told.get("total_commands_processed", 0)) if isinstance(told, dict) else 0
