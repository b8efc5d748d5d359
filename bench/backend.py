"""A fast AI SDK backend: raw asyncio protocols, each text delta stamped as it is written.

``POST`` anything with a body ``{"id": session, "bench": {"chunks", "rate", "gated", "endless"}}`` and it
streams that many deltas, ``rate`` a second (0: as fast as they are taken). A delta is ``<index>.<stamp>``,
the stamp of CLOCK_MONOTONIC, which all processes of a machine share. ``gated`` turns begin together on
``GET /go``, ``endless`` ones never finish, and all others finish at ``GET /stop``. ``GET /state`` tells who
waits, who talks, how much was written, and when clients were seen to leave.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import json
import os
import random
import sys
import time
from typing import Any, cast

import uvloop

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"x-vercel-ai-ui-message-stream: v1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
DELTA = b'data: {"type":"text-delta","id":"t1","delta":"%08d.%020d"}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(DELTA % (0, 0)), DELTA)
"""Its length never changes, so neither does the framing: one formatting makes a chunk."""

BLOCK = 64
"""Chunks of an unpaced turn between two looks at the others."""


def _framed(*events: bytes) -> bytes:
    return b"".join(b"%x\r\ndata: %b\n\n\r\n" % (len(event) + 8, event) for event in events)


OPENING = _framed(b'{"type":"start"}', b'{"type":"text-start","id":"t1"}')
ENDING = _framed(b'{"type":"text-end","id":"t1"}', b'{"type":"finish"}', b"[DONE]") + b"0\r\n\r\n"


class Clock:
    """Calls turns when due: to the microsecond from Python 3.13 on, else to the loop's millisecond."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[int, int, Turn]] = []
        self._order = itertools.count()
        self._descriptor = -1
        if sys.version_info >= (3, 13):
            self._descriptor = os.timerfd_create(time.CLOCK_MONOTONIC, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)
            self._loop.add_reader(self._descriptor, self._rang)

    def call_at(self, due: int, turn: Turn) -> None:
        """Call ``turn.speak(due)`` at a time of CLOCK_MONOTONIC, in nanoseconds."""
        heapq.heappush(self._due, (due, next(self._order), turn))
        if self._due[0][2] is turn:
            self._arm()

    def _rang(self) -> None:
        if sys.version_info >= (3, 13):
            os.read(self._descriptor, 8)
        self._run()

    def _run(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic_ns():
            due, _, turn = heapq.heappop(self._due)
            after = turn.speak(due)
            if after is not None:
                heapq.heappush(self._due, (after, next(self._order), turn))
        if self._due:
            self._arm()

    def _arm(self) -> None:
        due = self._due[0][0]
        if sys.version_info >= (3, 13):
            os.timerfd_settime_ns(self._descriptor, flags=os.TFD_TIMER_ABSTIME, initial=max(1, due))
        else:
            self._loop.call_later(max(0, due - time.monotonic_ns()) / 1e9, self._run)


class Backend:
    """What the turns share."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.gated: list[Turn] = []
        self.talking: set[Turn] = set()
        self.written = 0
        """Deltas of all turns that are finished."""
        self.closes: dict[str, int] = {}
        """Session to the moment at which its client was seen to leave a turn that was not finished."""

    def state(self) -> dict[str, Any]:
        """For ``GET /state``."""
        return {
            "gated": len(self.gated),
            "talking": len(self.talking),
            "written": self.written,
            "closes": self.closes,
        }

    def go(self) -> None:
        """Open the gate."""
        gated, self.gated = self.gated, []
        for turn in gated:
            turn.begin()

    def stop(self) -> None:
        """Let every turn finish with what it has written."""
        for turn in self.talking:
            turn.stop()


class Turn(asyncio.Protocol):
    """One connection: one request, one answer."""

    transport: asyncio.Transport

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._request = b""
        self._session = ""
        self._chunks = 0
        self._interval = 0
        self._endless = False
        self._index = 0
        self._paused = False
        self._open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)  # what uvloop gives is none by inheritance

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._request += data
        head, found, body = self._request.partition(b"\r\n\r\n")
        if not found:
            return
        lowered = head.lower()
        length = 0
        if b"content-length:" in lowered:
            length = int(lowered.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._request = b""
        match head.split(b" ", 2)[:2]:
            case [b"POST", _]:
                self._start(json.loads(body))
            case [_, b"/go"]:
                self._backend.go()
                self._tell({})
            case [_, b"/stop"]:
                self._backend.stop()
                self._tell({})
            case _:
                self._tell(self._backend.state())

    def eof_received(self) -> bool:
        """See asyncio."""
        self._left()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        del exc
        self._left()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._paused = True

    def resume_writing(self) -> None:
        """See asyncio."""
        self._paused = False
        if self._open:
            self._backend.clock.call_at(time.monotonic_ns(), self)

    def begin(self) -> None:
        """The gate is open. Paced turns begin anywhere in their interval: none march in step."""
        if self._open:
            self._backend.clock.call_at(time.monotonic_ns() + random.randrange(self._interval + 1), self)

    def stop(self) -> None:
        """Say no more deltas."""
        self._chunks = self._index

    def speak(self, due: int) -> int | None:
        """Write what is due; when to be called again, or ``None``: not until the client has taken some."""
        if not self._open or self._paused:
            return None
        if self._index >= self._chunks:
            pass  # it was told to stop
        elif self._interval:
            self.transport.write(CHUNK % (self._index, time.monotonic_ns()))
            self._index += 1
        else:
            stamp = time.monotonic_ns()
            stop = min(self._index + BLOCK, self._chunks)
            self.transport.write(b"".join([CHUNK % (index, stamp) for index in range(self._index, stop)]))
            self._index = stop
        if self._index >= self._chunks:
            self._finish()
            return None
        return due + self._interval if self._interval else time.monotonic_ns() + 1000

    def _start(self, body: dict[str, Any]) -> None:
        order = body["bench"]
        self._session = body.get("id", "")
        self._chunks = order["chunks"]
        self._interval = round(1e9 / order["rate"]) if order["rate"] else 0
        self._endless = order["endless"]
        self._open = True
        self._backend.talking.add(self)
        self.transport.write(STREAM_HEAD + OPENING)
        if order["gated"]:
            self._backend.gated.append(self)
        else:
            self.begin()

    def _finish(self) -> None:
        if self._endless:
            return
        self._open = False
        self._backend.talking.discard(self)
        self._backend.written += self._index
        self.transport.write(ENDING)
        self.transport.close()

    def _left(self) -> None:
        if self._open:
            self._backend.closes[self._session] = time.monotonic_ns()
        self._open = False
        self._backend.talking.discard(self)

    def _tell(self, told: dict[str, Any]) -> None:
        body = json.dumps(told).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        self.transport.write(head + body)
        self.transport.close()


async def _serve() -> None:
    backend = Backend()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Turn(backend), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.disable()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
