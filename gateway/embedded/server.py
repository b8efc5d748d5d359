"""The gateway's own Valkey: a real server, a child of this process.

Rule 1: never two servers on one append-only file. Two locks in the data directory hold that, not pids:

- ``gateway.lock`` is held by the gateway alone. Who holds it may start, and end, a server.
- ``valkey.lock`` is inherited by the server, which never looks at it: it is held as long as the gateway *or*
  its server lives. Held, and ``gateway.lock`` free, means that a gateway was killed and its server was not;
  that orphan is ended first.

Rule 2: an orphan is known by the name of its socket, which is random, written to ``valkey.json`` before the
server starts, and part of its command line. So a kill at no moment leaves a server that the next start cannot
find, and no process is ended because it got an old pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

import structlog

from gateway.embedded.host import (
    EmbeddedError,
    binary,
    keep_descriptors,
    make_runtime_directory,
    open_lock,
    owner,
    remove_socket,
    servers_on,
    take_lock,
)
from gateway.embedded.output import ServerLog

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_SOCKET = re.compile(r"/.*/session-gateway-[^/]+/valkey\.sock")
_DAMAGED_FILE = re.compile(
    r"(reading|loading) the (append.only|AOF|RDB)|AOF MANIFEST|check-aof|rdb file reading"
)
_POLL_SECONDS = 0.02
_PING_SECONDS = 1.0

_END_SECONDS = 10.0
"""For the last flush of the append-only file to a slow disk; what is written survives a SIGKILL anyway."""

_KILL_SECONDS = 5.0

_logger = structlog.get_logger(__name__)


class EmbeddedValkey:
    """A Valkey on a unix socket, its append-only file in ``data_dir``; an async context manager.

    Entered, the server answers and has read its file. Left, it has ended, and only its data and locks remain.

    Args:
        data_dir: Made if it is not there, for this user alone.
        max_memory_bytes: Full means that writes are refused; nothing is evicted.
        start_timeout_seconds: Longest silence of a starting server; one that is loading says so.

    Attributes:
        url: For ``redis.asyncio.from_url``.
        pid: The server's.

    Raises:
        EmbeddedError: On entering; nothing was left behind.
    """

    def __init__(self, data_dir: Path, *, max_memory_bytes: int, start_timeout_seconds: float = 10.0) -> None:
        self.url = ""
        self.pid = 0
        self._directory = data_dir.absolute()
        self._max_memory_bytes = max_memory_bytes
        self._start_timeout_seconds = start_timeout_seconds
        self._log = ServerLog()
        self._stack = AsyncExitStack()
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            lock = self._become_the_gateway(stack)
            await self._end_orphan(lock)
            socket = self._make_socket_path(stack)
            await self._spawn(stack, socket, lock)
            await self._wait_until_it_answers(socket)
            self._log.is_quiet = False
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def wait_exit(self) -> int:
        """Wait until the server ends; its status, or minus the signal that killed it."""
        if self._process is None:
            raise EmbeddedError("unable to wait for the gateway's own Valkey; it was not started")
        return await self._process.wait()

    def _become_the_gateway(self, stack: AsyncExitStack) -> int:
        """Take ``gateway.lock``; open ``valkey.lock``, and return it."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            gateway_lock = open_lock(stack, self._directory / "gateway.lock")
            server_lock = open_lock(stack, self._directory / "valkey.lock")
            if not take_lock(gateway_lock):
                raise EmbeddedError(
                    f"unable to use {self._directory}; {owner(gateway_lock)} uses it; "
                    "stop it, or set GATEWAY_DATA_DIR to another folder"
                )
            os.ftruncate(gateway_lock, os.pwrite(gateway_lock, b"%d\n" % os.getpid(), 0))
        except OSError as error:
            raise self._unusable(error) from error
        return server_lock

    def _unusable(self, error: OSError) -> EmbeddedError:
        return EmbeddedError(
            f"unable to use {self._directory} for the gateway's own Valkey; {error.strerror}; "
            "set GATEWAY_DATA_DIR to a folder that can be written, or GATEWAY_REDIS_URL to a server"
        )

    async def _end_orphan(self, lock: int) -> None:
        """Take ``valkey.lock``, ending the server that a killed gateway left behind."""
        socket = self._recorded_socket()
        for number, patience in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            signalled: set[int] = set()
            deadline = asyncio.get_running_loop().time() + patience
            # The lock, not the pid, says that it is gone: a fork that rewrites the file holds it too.
            while not (taken := take_lock(lock)) and asyncio.get_running_loop().time() < deadline:
                for pid in await asyncio.to_thread(servers_on, socket) - signalled:
                    _logger.warning("valkey.orphan_ended", pid=pid, signal=number.name)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
                    signalled.add(pid)
                await asyncio.sleep(_POLL_SECONDS)
            if taken:
                remove_socket(socket)
                return
        raise EmbeddedError(
            f"unable to use {self._directory}; a Valkey that this gateway cannot end holds "
            f"{self._directory / 'valkey.lock'}; end it by hand, or set GATEWAY_DATA_DIR to another folder"
        )

    def _recorded_socket(self) -> str | None:
        try:
            socket = json.loads((self._directory / "valkey.json").read_bytes())["socket"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return socket if isinstance(socket, str) and _SOCKET.fullmatch(socket) else None

    def _make_socket_path(self, stack: AsyncExitStack) -> str:
        """Make the runtime directory, and record it before a server can be in it."""
        socket = make_runtime_directory() + "/valkey.sock"
        record, fresh = self._directory / "valkey.json", self._directory / "valkey.json.new"
        stack.callback(remove_socket, socket)
        try:
            fresh.write_text(json.dumps({"socket": socket}))
            fresh.replace(record)
        except OSError as error:
            raise self._unusable(error) from error
        return socket

    async def _spawn(self, stack: AsyncExitStack, socket: str, lock: int) -> None:
        server = binary()
        keep_descriptors()
        output = await self._log.open()
        stack.push_async_callback(self._log.close)
        # The folder may have been made by somebody with other rights; uvloop has no umask argument.
        umask = os.umask(0o077)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(server, *self._options(socket)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C is for the gateway, which ends the server after its own drain.
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise EmbeddedError(f"unable to start {server}; {error.strerror}") from error
        finally:
            os.umask(umask)
            os.close(output)
        stack.push_async_callback(self._end)
        self.pid = self._process.pid
        self.url = "unix://" + quote(socket)

    def _options(self, socket: str) -> list[str]:
        options = {
            "dir": str(self._directory),
            "port": "0",
            "unixsocket": socket,
            "unixsocketperm": "700",
            "daemonize": "no",
            # The command line stays readable for the next start (rule 2).
            "set-proc-title": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "noeviction",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    async def _wait_until_it_answers(self, socket: str) -> None:
        clock = asyncio.get_running_loop().time
        heard_at = clock()
        while clock() - heard_at < self._start_timeout_seconds:
            answer = await _ping(socket)
            if answer.startswith(b"+PONG"):
                return
            if answer.startswith(b"-LOADING"):
                heard_at = clock()
            await asyncio.sleep(_POLL_SECONDS)
            if self._process is not None and self._process.returncode is not None:
                raise await self._died(self._process.returncode)
        raise EmbeddedError(
            f"unable to start the gateway's own Valkey in {self._directory}; "
            f"it did not answer for {self._start_timeout_seconds:g} s; it said last: {self._log.text()}"
        )

    async def _died(self, status: int) -> EmbeddedError:
        await self._log.close()
        text = self._log.text()
        advice = ""
        if _DAMAGED_FILE.search(text):
            files = self._directory / "appendonlydir"
            advice = (
                f"; repair {files} with valkey-check-aof --fix, or move it away to start without its chats"
            )
        return EmbeddedError(
            f"unable to start the gateway's own Valkey in {self._directory}; "
            f"it ended with status {status}; it said last: {text}{advice}"
        )

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._log.is_quiet = True
        try:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            _logger.warning("valkey.killed", pid=process.pid, after_seconds=_END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                # Its group: a fork that rewrites the file is to go too.
                os.killpg(process.pid, signal.SIGKILL)
            async with asyncio.timeout(_KILL_SECONDS):
                await process.wait()


async def _ping(socket: str) -> bytes:
    """The answer to a ``PING``; empty if there was none."""
    try:
        async with asyncio.timeout(_PING_SECONDS):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                writer.write(b"PING\r\n")
                return await reader.readline()
            finally:
                writer.close()
                await writer.wait_closed()
    except OSError:  # Its TimeoutError is one too.
        return b""
