"""A gateway as its users run it: a process of its own, told by environment, heard by its log."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any, Self

WAIT_SECONDS = 20.0


class GatewayProcess:
    """``python -m gateway`` with settings.

    Attributes:
        log: Its log, line by line; what is no JSON is under ``text``.
        address: Where clients connect, once it has started.
        admin_address: The same for operators.
    """

    def __init__(self, *arguments: str, **settings: object) -> None:
        self.log: list[dict[str, Any]] = []
        self.stdout = ""
        self.address = ""
        self.admin_address = ""
        self._arguments = arguments
        defaults = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "log_format": "json"}
        named = {**defaults, **settings}
        self._settings = {f"GATEWAY_{name.upper()}": str(value) for name, value in named.items()}
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", *self._arguments,
            env={**kept, **self._settings}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self._reading = asyncio.gather(self._read_log(), self._read_output())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        await self._reading

    async def started(self) -> Self:
        """Wait until it listens."""
        told = await self.said("node.started")
        self.address, self.admin_address = told["listen"], told["admin"]
        return self

    async def said(self, event: str, **members: object) -> dict[str, Any]:
        """Wait for a log line; returns it."""

        def found() -> list[dict[str, Any]]:
            return [
                line for line in self.log if line.get("event") == event and members.items() <= line.items()
            ]

        try:
            async with asyncio.timeout(WAIT_SECONDS), self._changed:
                await self._changed.wait_for(lambda: bool(found()))
        except TimeoutError as error:
            error.add_note(f"it said {self.log}")
            raise
        return found()[0]

    def terminate(self) -> None:
        """Ask it to stop."""
        self.process.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """End it with -9."""
        self.process.kill()
        await self.process.wait()

    async def exited(self) -> int:
        """Wait for its end; returns the exit status."""
        async with asyncio.timeout(WAIT_SECONDS):
            await self.process.wait()
            await self._reading
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def text(self) -> str:
        """What it wrote on standard error that is no log."""
        return "\n".join(line["text"] for line in self.log if "text" in line)

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            text = raw.decode().rstrip("\n")
            async with self._changed:
                self.log.append(json.loads(text) if text.startswith("{") else {"text": text})
                self._changed.notify_all()

    async def _read_output(self) -> None:
        assert self.process.stdout is not None
        self.stdout = (await self.process.stdout.read()).decode()
