"""What one client writes down, whatever its carrier."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tests.faults.torture_world.history import Ask, Reading

if TYPE_CHECKING:
    from tests.faults.torture_world.backend import TortureBackend
    from tests.faults.torture_world.history import Carrier, Ending, History


class Running:
    """The turns that anybody was told of and that nobody was told the end of: what a user would cancel."""

    def __init__(self) -> None:
        self._turns: dict[str, dict[str, None]] = defaultdict(dict)

    def note(self, session: str, line: dict[str, Any]) -> None:
        """A record was read."""
        if line["type"] == "turn-start":
            self._turns[session][line["turn"]] = None
        elif line["type"] == "turn-end":
            self._turns[session].pop(line["turn"], None)

    def one_of(self, session: str, dice: float) -> str | None:
        """A running turn."""
        turns = list(self._turns[session])
        return turns[int(dice * len(turns))] if turns else None


class Recorder:
    """Writes into the history for one client, and keeps its cursors.

    Attributes:
        name: Of the client.
        cursors: Of each session, the last it had; what it comes back with.
    """

    def __init__(self, name: str, history: History, backend: TortureBackend, running: Running) -> None:
        self.name = name
        self.cursors: dict[str, str] = {}
        self._history = history
        self._backend = backend
        self._running = running

    def begin(
        self,
        told: dict[str, Any],
        *,
        connection: int,
        carrier: Carrier,
        node: str,
        session: str,
        asked: str,
    ) -> Reading:
        """The client was told where it stands."""
        reading = Reading(
            client=self.name, connection=connection, carrier=carrier, node=node, session=session, asked=asked,
            at=time.monotonic(), cursor=told["cursor"], offset=told["offset"], last=told.get("last"),
            resync=told.get("resync"), turns=told.get("turns", []),
        )  # fmt: skip
        self._history.readings.append(reading)
        self.cursors[session] = reading.cursor
        return reading

    def got(self, reading: Reading, raw: str, line: dict[str, Any]) -> None:
        """The client was told a record."""
        reading.lines.append((time.monotonic(), raw))
        self.cursors[reading.session] = line["cursor"]
        self._running.note(reading.session, line)

    def stray(self, raw: str) -> None:
        """The client was told a record of a session that it is not attached to."""
        self._history.strays.append((self.name, raw))

    def resync(self, reading: Reading, reason: str) -> None:
        """The client was told to start from a complete state."""
        reading.ending, reading.reason = "resync", reason
        self.cursors.pop(reading.session, None)

    @staticmethod
    def end(reading: Reading, ending: Ending) -> None:
        """The client reads no more there."""
        if reading.ending == "open":
            reading.ending = ending

    def asked(self, command: dict[str, Any], *, connection: int, carrier: Carrier, node: str) -> Ask:
        """A command is about to be written."""
        kept = {name: value for name, value in command.items() if name != "body"}
        ask = Ask(self.name, connection, carrier, node, kept, time.monotonic())
        self._history.asks.append(ask)
        return ask

    def replied(self, ask: Ask, reply: dict[str, Any]) -> None:
        """Its reply was read."""
        ask.reply, ask.replied_at = reply, time.monotonic()
        if reply["type"] == "cancelled":
            cancelled = [each["turn"] for each in reply["turns"] if each["result"] == "cancelled"]
            ask.open_upstreams = [turn for turn in cancelled if self._backend.is_open(turn)]


def decode(raw: str) -> dict[str, Any]:
    """One line of a frame."""
    line: dict[str, Any] = json.loads(raw)
    return line
