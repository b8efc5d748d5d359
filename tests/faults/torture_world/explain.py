"""What may explain how a turn ended: who sent it, who cancelled it, what befell its node."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.torture_world.checker import Facts
    from tests.faults.torture_world.history import Ask, Befallen

GRACE_SECONDS = 1.0
"""A fault may have begun that much before the turn that it ended was asked for, as a proxy delays replies."""

HELD_SECONDS = 15.0
"""What a failover lost may be written again for about that long; a node that is hit meanwhile cannot."""


def slot_of(facts: Facts, turn: str) -> int | None:
    """The slot whose node produced a turn: who accepted it first. None: nobody knows."""
    for ask in facts.sends.get(turn, ()):
        if ask.reply is not None and ask.reply["type"] == "accepted" and not ask.reply.get("duplicate"):
            return int(ask.node.partition(".")[0])
    return None


def cancels_of(facts: Facts, session: str, turn: str) -> list[Ask]:
    """Who may have cancelled: by name, all, or by a send that interrupts; before anybody was told the end."""
    before = facts.first_told.get((turn, "turn-end"), float("inf"))
    return [
        ask
        for ask in facts.endings.get(session, ())
        if ask.asked_at <= before
        and (ask.command["type"] == "send") == (ask.command.get("turn") not in {None, turn})
    ]


def node_faults_of(facts: Facts, turn: str) -> list[Befallen]:
    """Faults that may end a turn, while it ran, of its node.

    If nobody knows which, because no first `accepted` came: of any, and of the store, which may have begun a
    turn and not told the node in time; the send was refused as retryable then, and the node seals what it
    does not produce.
    """
    asked = [ask.asked_at for ask in facts.sends.get(turn, ())]
    since = min(asked, default=0.0) - GRACE_SECONDS
    until = facts.first_told.get((turn, "turn-end"), float("inf"))
    slot = slot_of(facts, turn)
    return [
        fault
        for fault in facts.history.faults
        if fault.at <= until
        and fault.until >= since
        and (slot is None or (fault.slot == slot and _ends_turns(facts, fault, until)))
    ]


def _ends_turns(facts: Facts, fault: Befallen, told_at: float) -> bool:
    if fault.kind == "drain":
        return told_at >= fault.at + facts.history.drain_seconds
    return fault.kind in {"kill", "stop-long"}


def may_be_lost(facts: Facts, turn: str) -> bool:
    """Whether the store and the node that held a turn were lost together."""
    first = min((ask.asked_at for ask in facts.sends.get(turn, ())), default=0.0)
    failovers = [fault for fault in facts.history.faults if fault.kind == "failover" and fault.until >= first]
    slot = slot_of(facts, turn)
    if failovers and turn not in facts.requests:
        return True  # a send that was cancelled before it came has no producer that could hold it
    return any(
        fault.kind in {"kill", "stop-long", "drain"}
        and slot in {None, fault.slot}
        and fault.at <= failover.until + HELD_SECONDS
        and fault.until >= failover.at - HELD_SECONDS
        for failover in failovers
        for fault in facts.history.faults
    )


def end_may_be_lost(facts: Facts, turn: str) -> bool:
    """Whether a turn had just ended when the store lost its newest records, and its node was hit too.

    Nobody was left to write the end again, so the turn is sealed: what both lose together is lost.
    """
    ended_at = facts.first_told.get((turn, "turn-end"), float("inf"))
    slot = slot_of(facts, turn)
    return any(
        failover.kind == "failover"
        and failover.at - GRACE_SECONDS <= ended_at <= failover.until + GRACE_SECONDS
        and fault.kind in {"kill", "stop-long", "drain"}
        and slot in {None, fault.slot}
        and fault.at <= failover.until + HELD_SECONDS
        and fault.until >= failover.at
        for failover in facts.history.faults
        for fault in facts.history.faults
    )


def describe(facts: Facts, ask: Ask) -> str:
    """A command and its reply, in a line."""
    began_at = facts.history.began_at
    replied = "no reply" if ask.replied_at is None else f"{ask.replied_at - began_at:.3f} {ask.reply}"
    who = f"{ask.client}#{ask.connection} node {ask.node}"
    return f"{who} {ask.asked_at - began_at:.3f} {ask.command} -> {replied}"
