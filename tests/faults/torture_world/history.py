"""What happened, as clients and the backend saw it. The checker knows nothing else.

All times are of this process' monotonic clock: clients, proxies and the backend live in it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

Carrier = Literal["websocket", "sse", "long-poll"]

Ending = Literal["open", "lost", "left", "moved", "resync"]
"""How a reading ended: the connection broke; its client left; it attached elsewhere on it; it was told to."""


@dataclass(slots=True)
class Reading:
    """What one client was told of one session from one `attached` on, or in one poll.

    Attributes:
        client: Who; a name of the torture's own.
        connection: Which of its connections.
        carrier: How.
        node: The slot it was connected to, and which process there: ``1.3``.
        session: Of what.
        asked: A cursor, or ``start`` or ``running``; ``send``: a send attached it.
        at: When it was told where it stands.
        cursor: Where it stands.
        offset: Its offset.
        last: The newest offset at that moment, if that was told.
        resync: Why it does not stand where it was asked for.
        turns: The turns told with it.
        lines: Records, each as it came, byte for byte; with when.
        ending: How it ended.
        reason: Of a `resync` push.
    """

    client: str
    connection: int
    carrier: Carrier
    node: str
    session: str
    asked: str
    at: float
    cursor: str
    offset: int
    last: int | None = None
    resync: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)
    ending: Ending = "open"
    reason: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.client}#{self.connection} ({self.carrier}, node {self.node})"


@dataclass(slots=True)
class Ask:
    """A command and its reply.

    Attributes:
        command: Without its body.
        asked_at: When it was written.
        reply: None: it never came.
        replied_at: When it was read.
        open_upstreams: Turns that the reply calls cancelled and whose backend connection was open when the
            reply was read, by the kernel's own word.
    """

    client: str
    connection: int
    carrier: Carrier
    node: str
    command: dict[str, Any]
    asked_at: float
    reply: dict[str, Any] | None = None
    replied_at: float | None = None
    open_upstreams: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Request:
    """One request that the backend had, and what it answered.

    Attributes:
        turn: As the body names it.
        plan: How it was to answer.
        arrived_at: When it had come whole.
        open_at_arrival: Whether the peer's side was open then.
        written: Each payload that was written, or was being written.
        finished_at: When it had been written to its planned end.
        closed_at: When the gateway's side was seen closed.
        longest_write_seconds: How long the slowest write took.
    """

    turn: str
    session: str
    plan: dict[str, Any]
    arrived_at: float
    open_at_arrival: bool
    written: list[Any] = field(default_factory=list)
    finished_at: float | None = None
    closed_at: float | None = None
    longest_write_seconds: float = 0.0


@dataclass(slots=True)
class Befallen:
    """A fault that was done.

    Attributes:
        kind: As in the schedule.
        slot: Of the node; None: the store.
        at: When it began.
        until: When it was over.
        note: More, for people.
    """

    kind: str
    slot: int | None
    at: float
    until: float
    note: str = ""


@dataclass(slots=True)
class History:
    """Everything that is judged.

    Attributes:
        lease_seconds: GATEWAY_LEASE.
        drain_seconds: GATEWAY_DRAIN.
        strays: Records pushed to a client that was not attached: who, and the line.
        finals: Each session read whole from each node at the end.
        unreadable: Sessions that could not be read at the end: who, and why.
        sealed: Turns that a node logged as sealed, and when; for the figures alone.
        calm_at: When the faults had ended.
    """

    seed: int
    lease_seconds: float
    drain_seconds: float
    began_at: float = 0.0
    calm_at: float = 0.0
    ended_at: float = 0.0
    readings: list[Reading] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    faults: list[Befallen] = field(default_factory=list)
    strays: list[tuple[str, str]] = field(default_factory=list)
    finals: list[Reading] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    sealed: dict[str, float] = field(default_factory=dict)

    @property
    def lost_something(self) -> bool:
        """Whether a fault could make the store forget what it had acknowledged."""
        return any(fault.kind == "failover" for fault in self.faults)

    def save(self, path: Path) -> None:
        """Keep it, a line each."""
        with path.open("w") as file:
            json.dump({"seed": self.seed, "lease": self.lease_seconds, "drain": self.drain_seconds}, file)
            for name in ("readings", "asks", "requests", "faults", "finals"):
                for item in getattr(self, name):
                    file.write("\n" + json.dumps({name: asdict(item)}, ensure_ascii=False))


def epoch_of(cursor: str) -> str:
    """The epoch in a cursor; the checker alone looks into one."""
    return cursor.partition(".")[0]


def offset_of(cursor: str) -> int:
    """The offset in a cursor."""
    return int(cursor.split(".")[1])
