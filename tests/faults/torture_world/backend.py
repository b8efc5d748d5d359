"""The backend: what it answers can be told apart chunk by chunk, and it notes when what happened."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any

from tests.faults.torture_world.history import Request
from tests.support.backend import Exchange, ScriptedBackend

if TYPE_CHECKING:
    from tests.faults.torture_world.history import History

ESTABLISHED = 1
"""Of `struct tcp_info`: neither side has closed, as the kernel knows it. Linux, `tcp_states.h`."""


def is_established(exchange: Exchange) -> bool:
    """Whether a connection is open on both sides.

    The kernel is asked, not the event loop: on one machine a closed side is known here before its closer's
    next system call, so no allowance for the loop's own delays is needed.
    """
    connection = exchange.writer.get_extra_info("socket")
    if exchange.writer.transport.is_closing() or connection is None or connection.fileno() < 0:
        return False
    state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return bool(state[0] == ESTABLISHED)


def chunks_of(turn: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of an answer before its end; each delta names its turn and its index."""
    deltas = [
        {"type": "text-delta", "id": "t", "delta": f"{turn}:{index}:".ljust(size, "x")}
        for index, size in enumerate(plan["sizes"])
    ]
    return [{"type": "start"}, {"type": "text-start", "id": "t"}, *deltas]


def end_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks that end it."""
    match plan["end"]:
        case "complete":
            return [{"type": "text-end", "id": "t"}, {"type": "finish"}]
        case "error":
            return [{"type": "error", "errorText": "as planned"}]
        case "abort":
            return [{"type": "abort"}]
        case _:
            return []


class TortureBackend:
    """Serves answers as their bodies plan them.

    Args:
        history: Gets each request.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._open: dict[str, list[Exchange]] = {}
        self.server = ScriptedBackend(self._serve)

    def is_open(self, turn: str) -> bool:
        """Whether a connection that asks for the turn is open, now."""
        return any(is_established(exchange) for exchange in self._open.get(turn, ()))

    async def _serve(self, exchange: Exchange) -> None:
        body = exchange.json
        self.server.exchanges.clear()  # the connections of a long run are not all kept
        turn = body["turn"]
        request = Request(turn, body["id"], body["plan"], time.monotonic(), is_established(exchange))
        self._history.requests.append(request)
        self._open.setdefault(turn, []).append(exchange)
        watching = asyncio.create_task(_note_close(exchange, request), name=f"watch-{turn}")
        try:
            await self._answer(exchange, request)
        finally:
            self._open[turn].remove(exchange)
            if not self._open[turn]:
                del self._open[turn]
            watching.cancel()

    async def _answer(self, exchange: Exchange, request: Request) -> None:
        plan = request.plan
        if plan["end"] == "refuse":
            await exchange.head("500 Internal Server Error", {"Content-Type": "text/plain"})
            await exchange.raw(b"as planned")
            await exchange.end()
            request.finished_at = time.monotonic()
            return
        await exchange.head()
        chunks = chunks_of(request.turn, plan)
        for first in range(0, len(chunks), plan["together"]):
            await self._say(exchange, request, chunks[first : first + plan["together"]])
            await asyncio.sleep(plan["pace"])
        if plan["end"] == "hang":
            await exchange.was_closed.wait()
            return
        if plan["end"] == "cut":
            request.finished_at = time.monotonic()
            exchange.drop()
            return
        await self._say(exchange, request, end_of(plan))
        request.finished_at = time.monotonic()
        await exchange.say("[DONE]")
        await exchange.end()

    async def _say(self, exchange: Exchange, request: Request, chunks: list[dict[str, Any]]) -> None:
        if exchange.was_closed.is_set():
            raise ConnectionResetError("unable to go on; the gateway hung up")
        request.written += chunks
        began_at = time.monotonic()
        await exchange.say(*chunks)
        request.longest_write_seconds = max(request.longest_write_seconds, time.monotonic() - began_at)


async def _note_close(exchange: Exchange, request: Request) -> None:
    await exchange.was_closed.wait()
    request.closed_at = time.monotonic()
