"""The process in which the real client runs: ``client.mjs`` on the Node of the tests."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Self

from bench.answers import BenchError
from bench.clients import SECONDS

_ROOT = Path(__file__).resolve().parent.parent
_PROGRAM = _ROOT / "bench" / "client.mjs"
_CLIENT = _ROOT / "client" / "dist" / "index.js"
_LINE_BYTES = 64 * 1024 * 1024
"""A line of answer holds all latencies of a window."""


def node_binary() -> Path | None:
    """The Node 22 of the tests' lock: older ones have no WebSocket."""
    return next((_ROOT / "tests" / "node" / "node_modules").glob("node-*/bin/node"), None)


def has_client() -> bool:
    """Whether the client is built, and there is a Node to run it."""
    return node_binary() is not None and _CLIENT.exists()


class NodeProgram:
    """Runs ``client.mjs``; use as an async context manager."""

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            str(node_binary()),
            str(_PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
        await self._compare_clocks()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.kill()
        await self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def ask(self, name: str, **asked: Any) -> dict[str, Any]:
        """Have one command of ``client.mjs`` done.

        Raises:
            BenchError: It failed, or took too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": name, **asked}).encode() + b"\n")
        try:
            async with asyncio.timeout(SECONDS):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise BenchError(f"unable to measure; the client's {name} took too long") from None
        if not line:
            raise BenchError("unable to measure; the client's process ended")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise BenchError(f"unable to measure; the client's {name} failed: {told['error']}")
        return told

    async def _compare_clocks(self) -> None:
        """A latency is the difference of two processes' clocks: they must be one."""
        before = time.monotonic_ns()
        now = int((await self.ask("now"))["now"])
        if not before <= now <= time.monotonic_ns():
            raise BenchError("unable to measure; Node's clock is not Python's")
