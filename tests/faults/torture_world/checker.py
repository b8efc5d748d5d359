"""What the judge looks at: a history, put in order.

Each rule (`check_*.py`) is a function of these facts and yields what breaks it. It knows what clients were
told and what the backend saw, and nothing else. How long anything took is not judged, but for the end: by
then every turn has ended, and every client that stayed has had everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.faults.torture_world.history import Reading, epoch_of
from tests.faults.torture_world.recorder import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.faults.torture_world.history import Ask, History, Request


RUNS = frozenset({"queued", "running", "cancelling"})
"""States of a turn that has not ended."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A guarantee that was not kept.

    Attributes:
        rule: Which.
        session: Where.
        text: What, with who saw it.
        around: What is worth to be seen with it.
    """

    rule: str
    session: str
    text: str
    around: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n      ".join((f"{self.rule} {self.session}: {self.text}", *self.around))


@dataclass(slots=True)
class Told:
    """A record, as it was told first.

    Attributes:
        raw: Byte for byte.
        line: Decoded.
        by: The first that was told it.
        at: When.
    """

    raw: str
    line: dict[str, Any]
    by: str
    at: float


@dataclass(slots=True)
class Facts:
    """The history, put in order.

    Attributes:
        history: As it was recorded.
        cursors: What was told first at each cursor of a session.
        befores: The cursor that was told before each, and to whom.
        journals: Of each session and epoch, what stands at each offset, as anybody was told it.
        forks: Sessions and epochs of which clients were told different histories: a failover lost one of
            them, and who had it is to be told `resync`.
        finals: The last reading of each session, of the first node.
        requests: The backend's, by turn.
        asks: Commands by type.
        sends: Those by turn.
        endings: By session: what may cancel a turn of it.
        first_told: Of each turn and kind of record, when it was told first.
    """

    history: History
    cursors: dict[tuple[str, str], Told] = field(default_factory=dict)
    befores: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    journals: dict[str, dict[str, dict[int, Told]]] = field(default_factory=dict)
    forks: set[tuple[str, str]] = field(default_factory=set)
    finals: dict[str, Reading] = field(default_factory=dict)
    requests: dict[str, list[Request]] = field(default_factory=dict)
    asks: dict[str, list[Ask]] = field(default_factory=dict)
    sends: dict[str, list[Ask]] = field(default_factory=dict)
    endings: dict[str, list[Ask]] = field(default_factory=dict)
    first_told: dict[tuple[str, str], float] = field(default_factory=dict)
    _turns: dict[tuple[str, str], dict[str, list[Told]]] = field(default_factory=dict)

    def final_epoch(self, session: str) -> str:
        """The epoch that the session has at the end; empty if it has no record."""
        final = self.finals.get(session)
        return epoch_of(decode(final.lines[0][1])["cursor"]) if final is not None and final.lines else ""

    def turns_of(self, session: str, epoch: str) -> dict[str, list[Told]]:
        """The records of each turn that anybody was told, in order."""
        if (session, epoch) not in self._turns:
            turns = self._turns[session, epoch] = {}
            journal = self.journals.get(session, {}).get(epoch, {})
            if self.history.lost_something and epoch == self.final_epoch(session):
                last = self.finals[session].offset + len(self.finals[session].lines)
                journal = {offset: told for offset, told in journal.items() if offset <= last}
            for offset in sorted(journal):
                turns.setdefault(journal[offset].line["turn"], []).append(journal[offset])
        return self._turns[session, epoch]


def collect(history: History) -> tuple[Facts, list[Violation]]:
    """Put a history in order; two contents at one cursor, and two orders, show here."""
    facts = Facts(history)
    for final in history.finals:
        facts.finals.setdefault(final.session, final)
    # The last readings first: where a loss made two histories of one epoch, theirs is the one that stands.
    conflicts = [
        conflict for reading in (*history.finals, *history.readings) for conflict in _merge(facts, reading)
    ]
    for request in history.requests:
        facts.requests.setdefault(request.turn, []).append(request)
    for ask in history.asks:
        facts.asks.setdefault(ask.command["type"], []).append(ask)
        if ask.command["type"] == "send":
            facts.sends.setdefault(ask.command["turn"], []).append(ask)
        if ask.command["type"] == "cancel" or ask.command.get("overlap") == "interrupt":
            facts.endings.setdefault(ask.command["session"], []).append(ask)
    return facts, conflicts


def _merge(facts: Facts, reading: Reading) -> Iterator[Violation]:
    session = reading.session
    before = reading.asked if reading.resync is None else ""
    for at, raw in reading.lines:
        line = decode(raw)
        cursor = line["cursor"]
        new = Told(raw, line, reading.name, at)
        known = facts.cursors.setdefault((session, cursor), new)
        if known.raw != raw:
            yield Violation("G1", session, f"two contents at cursor {cursor}", _both(known, new))
        known.at = min(known.at, at)
        there = facts.journals.setdefault(session, {}).setdefault(epoch_of(cursor), {})
        stands = there.setdefault(line["offset"], new)
        if stands.raw != raw and (session, epoch_of(cursor)) not in facts.forks:
            facts.forks.add((session, epoch_of(cursor)))
            if not facts.history.lost_something:
                text = f"two contents at offset {line['offset']} of one epoch, though no fault lost anything"
                yield Violation("G1", session, text, _both(stands, new))
        if (session, before) in facts.cursors:
            other = facts.befores.setdefault((session, cursor), (before, reading.name))
            if other[0] != before:
                text = (
                    f"two orders: before {cursor}, {other[1]} was told {other[0]} and {reading.name} {before}"
                )
                yield Violation("G2", session, text)
        before = cursor
        key = line["turn"], line["type"]
        facts.first_told[key] = min(at, facts.first_told.get(key, at))


def _both(one: Told, other: Told) -> tuple[str, ...]:
    return tuple(f"{each.by}: {each.raw[:300]}" for each in (one, other))


def lines_around(lines: Iterable[tuple[float, str]], index: int, began_at: float) -> tuple[str, ...]:
    """Some records before and after one, cut short."""
    every = list(lines)
    return tuple(
        f"{'>' if number == index else ' '} {at - began_at:8.3f} {raw[:200]}"
        for number, (at, raw) in list(enumerate(every))[max(0, index - 3) : index + 3]
    )
