"""The HTTP in one connection through a network: looked at and held back, never changed."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from tests.support.http_framing import Framing, Head, Mark, Part

if TYPE_CHECKING:
    from tests.support.network import Network

HELD_BYTES = 16 * 1024 * 1024
"""Most that is held back of one response; one that is longer passes from there on, as nginx does it."""

REFUSAL = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 8\r\nConnection: close\r\n\r\nblocked\n"
)


class UpgradeBlockedError(Exception):
    """A request for a WebSocket has come, and is not to pass."""


class Http:
    """What is known of the HTTP in one connection, and what of it is held back."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._methods: deque[str] = deque()
        self._requests = Framing(lambda head: head.body(unsaid=0))
        self._responses = Framing(self._body_of_response)
        self._held_up = bytearray()
        self._held_down = bytearray()
        self._holds_stream = False

    def up(self, data: bytes) -> bytes:
        """Take bytes of the client; returns those that may pass.

        Raises:
            UpgradeBlockedError: And nothing of this may.
        """
        for piece, mark in self._requests.feed(data):
            self._held_up += piece
            if Mark.HEAD in mark:
                self._methods.append(self._requests.head.words[0])
                if self._requests.head.is_upgrade and self._network.block_upgrades:
                    raise UpgradeBlockedError
        if data and self._network.block_upgrades and self._requests.within_head:
            return b""
        passing, self._held_up = bytes(self._held_up), bytearray()
        return passing

    def down(self, data: bytes) -> bytes:
        """Take bytes of the gateway; returns those that may pass, all there are at its end (``b""``)."""
        passing = bytearray()
        for piece, mark in self._responses.feed(data):
            self._held_down += piece
            if Mark.HEAD in mark and self._network.buffer_streams and self._responses.head.is_stream:
                self._holds_stream = True
                self._network.count(streams_held=1)
            if Mark.MESSAGE in mark or len(self._held_down) > HELD_BYTES:
                self._holds_stream = False
            passing += self._free()
        if not data:
            self._holds_stream = False
            passing += self._held_down
            self._held_down.clear()
        return bytes(passing)

    def freed(self) -> bytes:
        """What is held back of a response although nothing says so any more."""
        self._holds_stream &= self._network.buffer_streams
        return bytes(self._free())

    def freed_up(self) -> bytes:
        """The same of a request."""
        return b"" if self._network.block_upgrades else self.up(b"")

    def _free(self) -> bytearray:
        if self._holds_stream or (self._network.buffer_streams and self._responses.within_head):
            return bytearray()
        passing, self._held_down = self._held_down, bytearray()
        return passing

    def _body_of_response(self, head: Head) -> int | None:
        status = head.words[1]
        if status == "101":
            self._requests.part = Part.REST
            return None
        if status.startswith("1"):
            return 0
        method = self._methods.popleft() if self._methods else ""
        return 0 if method == "HEAD" or status in {"204", "304"} else head.body(unsaid=None)
