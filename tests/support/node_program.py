"""A Node program of ``tests/node``: a process that takes commands and tells what happened as JSON lines.

A program ends when its standard input does, so none outlives the tests, however those end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final, Self

NODE_DIRECTORY: Final = Path(__file__).parents[1] / "node"
WAIT_SECONDS: Final = 30.0
"""How long anything here is waited for, unless a call says otherwise; generous, for a busy machine."""
END_SECONDS: Final = 10.0
"""How long a program may take to end by itself before it is killed."""
STDERR_BYTES: Final = 64 * 1024
"""The newest of a program's complaints that are kept, to be shown when it fails."""
LINE_BYTES: Final = 64 * 1024 * 1024
"""The longest line: a request's body, with images, is told in one."""


class NodeError(RuntimeError):
    """A Node program is missing, refused a command, or ended; the message has its stderr."""


def require_node_modules() -> None:
    """Raise a clear error unless ``make test`` has installed the packages and built the page."""
    built = NODE_DIRECTORY / "dist"
    for needed in (NODE_DIRECTORY / "node_modules" / "ai7", built / "main.js", built / "gateway7.mjs"):
        if not needed.exists():
            missing = needed.relative_to(NODE_DIRECTORY.parents[1])
            raise NodeError(f"unable to find {missing}; run make test once")


def node_binary() -> str:
    """Return the Node 22 of the lock (`ai` 7 needs it), or the machine's own where there is none."""
    require_node_modules()
    pinned = next((NODE_DIRECTORY / "node_modules").glob("node-*/bin/node"), None)
    found = str(pinned) if pinned else shutil.which("node")
    if found is None:
        raise NodeError("unable to find Node; run make test once, or install Node 22 or newer")
    return found


def chromium_binary() -> str:
    """Return the Chromium to drive: ``CHROMIUM``, or the one on the path."""
    named = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, filter(None, named)) if path), None)
    if found is None:
        raise NodeError("unable to find Chromium; install the package chromium or set CHROMIUM")
    return found


class NodeProgram:
    """One process that speaks JSON lines; use as an async context manager.

    Args:
        script: A file in ``tests/node``.
        arguments: What follows it on the command line.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._script = script
        self._arguments = arguments
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._commands_sent = 0
        self._stderr = bytearray()
        self._ended = False

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            node_binary(),
            str(NODE_DIRECTORY / self._script),
            *self._arguments,
            cwd=NODE_DIRECTORY,
            # Compiled modules are kept, or each start compiles the whole SDK again.
            env={**os.environ, "NODE_COMPILE_CACHE": str(NODE_DIRECTORY / "node_modules" / ".compile-cache")},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        self._readers = [
            asyncio.create_task(self._read_lines(), name=f"{self._script} stdout"),
            asyncio.create_task(self._read_complaints(), name=f"{self._script} stderr"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        await asyncio.gather(*self._readers)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await self._process.stdin.wait_closed()

    def kill(self) -> None:
        """End the process at once with SIGKILL: for a client, a reload or a crash of its tab."""
        if self._process.returncode is None:
            self._process.kill()

    async def do(self, command: str, *, seconds: float = WAIT_SECONDS, **facts: Any) -> Any:
        """Have a command done and return its result; facts that are ``None`` are left out.

        Raises:
            NodeError: It was refused or failed, or the program ended.
            TimeoutError: There was no reply in ``seconds``.
        """
        if self._ended:
            raise self._gone(f"do {command}")
        self._commands_sent += 1
        number = self._commands_sent
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        given = {name: fact for name, fact in facts.items() if fact is not None}
        line = json.dumps({"id": number, "do": command, **given}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            async with asyncio.timeout(seconds):
                self._process.stdin.write(line)
                return await reply
        finally:
            del self._replies[number]

    def complaints(self) -> str:
        """Return the newest that the program wrote to stderr."""
        return self._stderr.decode(errors="replace")

    def _gone(self, wish: str) -> NodeError:
        return NodeError(f"unable to {wish}; {self._script} has ended. Its stderr:\n{self.complaints()}")

    async def _read_lines(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                told = json.loads(line)
                if "event" in told:
                    await self._happened(told)
                else:
                    self._replied(told)
        finally:
            self._ended = True
            for command, reply in self._replies.items():
                if not reply.done():
                    reply.set_exception(self._gone(f"finish command {command}"))
            await self._happened(None)

    async def _happened(self, event: dict[str, Any] | None) -> None:
        """Take an event that the program told, or ``None`` when it has ended."""

    def _replied(self, line: dict[str, Any]) -> None:
        reply = self._replies.get(line["id"])
        if reply is None or reply.done():
            return  # whoever asked has stopped waiting
        if "error" in line:
            reply.set_exception(NodeError(f"{line['error']}\nstderr of {self._script}:\n{self.complaints()}"))
        else:
            reply.set_result(line["result"])

    async def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        while piece := await self._process.stderr.read(STDERR_BYTES):
            self._stderr += piece
            del self._stderr[:-STDERR_BYTES]
