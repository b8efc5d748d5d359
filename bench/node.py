"""The process in which the real client runs: ``client.mjs`` on the Node of the tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

from bench.answers import BenchError
from bench.program import Program

_ROOT = Path(__file__).resolve().parent.parent
_PROGRAM = _ROOT / "bench" / "client.mjs"
_CLIENT = _ROOT / "client" / "dist" / "index.js"


def node_binary() -> Path | None:
    """The Node 22 of the tests' lock: older ones have no WebSocket."""
    return next((_ROOT / "tests" / "node" / "node_modules").glob("node-*/bin/node"), None)


def has_client() -> bool:
    """Whether the client is built, and there is a Node to run it."""
    return node_binary() is not None and _CLIENT.exists()


class NodeProgram(Program):
    """Runs ``client.mjs``; use as an async context manager."""

    def __init__(self) -> None:
        super().__init__("the client", str(node_binary()), str(_PROGRAM))

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self._compare_clocks()
        return self

    async def _compare_clocks(self) -> None:
        """A latency is the difference of two processes' clocks: they must be one."""
        before = time.monotonic_ns()
        now = int((await self.ask("now"))["now"])
        if not before <= now <= time.monotonic_ns():
            raise BenchError("unable to measure; Node's clock is not Python's")
