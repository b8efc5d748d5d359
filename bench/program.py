"""A process beside the load's, told by lines of JSON on stdin what to do; each line is answered by one."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Self

from bench.answers import BenchError
from bench.clients import SECONDS

_LINE_BYTES = 64 * 1024 * 1024
"""A line of answer holds all latencies of a window."""


class Program:
    """Runs a program; use as an async context manager.

    Args:
        name: For errors.
        command: What to run.
    """

    def __init__(self, name: str, *command: str) -> None:
        self._name = name
        self._command = command

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def ask(self, name: str, **asked: Any) -> dict[str, Any]:
        """Have one of the program's commands done.

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
            raise BenchError(f"unable to measure; {self._name}'s {name} took too long") from None
        if not line:
            raise BenchError(f"unable to measure; {self._name}'s process ended")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise BenchError(f"unable to measure; {self._name}'s {name} failed: {told['error']}")
        return told
