"""G4 and the replies: a cancel that was answered has happened, and a send is accepted where it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.torture_world.checker import Facts, Violation
from tests.faults.torture_world.explain import end_may_be_lost
from tests.faults.torture_world.history import epoch_of, offset_of
from tests.faults.torture_world.recorder import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.torture_world.history import Ask


def cancelled_means_closed(facts: Facts) -> Iterator[Violation]:
    """G4: when the reply is read, the kernel knows the backend's connection closed; and none comes later."""
    for ask, turn, result in _results(facts):
        if result == "cancelled":
            if turn in ask.open_upstreams:
                text = f"{turn} was answered cancelled to {_who(facts, ask)} and its connection was open"
                yield Violation("G4", ask.command["session"], text)
            for request in facts.requests.get(turn, ()):
                if request.open_at_arrival and request.arrived_at > (ask.replied_at or 0):
                    text = (
                        f"{turn} was answered cancelled to {_who(facts, ask)}, and then asked of the backend"
                    )
                    yield Violation("G4", ask.command["session"], text)


def a_cancel_before_its_send_is_remembered(facts: Facts) -> Iterator[Violation]:
    """G4: `unknown` means that the send, when it comes, is cancelled; unless a failover forgot it."""
    if facts.history.lost_something:
        return
    for ask, turn, result in _results(facts):
        for request in facts.requests.get(turn, ()) if result == "unknown" else ():
            if request.arrived_at > (ask.replied_at or 0):
                text = f"{turn} was cancelled by {_who(facts, ask)} before its send, and asked of the backend"
                yield Violation("G4", ask.command["session"], text)


def a_cancel_says_how_its_turn_ended(facts: Facts) -> Iterator[Violation]:
    """G4: `cancelled` and `interrupted` are what the `turn-end` says."""
    for ask, turn, result in _results(facts):
        session = ask.command["session"]
        told = facts.turns_of(session, facts.final_epoch(session)).get(turn)
        if told is None or told[-1].line["type"] != "turn-end":
            continue
        reason = told[-1].line["reason"]
        may_be_lost = reason == "interrupted" and end_may_be_lost(facts, turn)
        if result in {"cancelled", "interrupted"} and reason != result and not may_be_lost:
            text = f"{turn} was answered {result} to {_who(facts, ask)} and ended {reason}"
            yield Violation("G4", session, text, (told[-1].raw[:300],))


def a_send_is_accepted_just_before_its_turn(facts: Facts) -> Iterator[Violation]:
    """The reply's cursor is just before the `turn-start`, and the reply comes before any record."""
    starts = {
        (session, epoch, told.line["turn"]): offset
        for session, epochs in facts.journals.items()
        for epoch, journal in epochs.items()
        for offset, told in journal.items()
        if told.line["type"] == "turn-start"
    }
    for ask in facts.asks.get("send", ()):
        if ask.reply is None or ask.reply["type"] != "accepted":
            continue
        session, turn, cursor = ask.command["session"], ask.command["turn"], ask.reply["cursor"]
        start = starts.get((session, epoch_of(cursor), turn))
        if start is not None and start != offset_of(cursor) + 1:
            text = f"{turn} was accepted to {_who(facts, ask)} at {cursor} and starts at {start}"
            yield Violation("G2", session, text)
    yield from _too_early(facts)


def _too_early(facts: Facts) -> Iterator[Violation]:
    first = {
        (ask.client, ask.connection, ask.command["turn"]): ask
        for ask in facts.asks.get("send", ())
        if ask.connection and ask.reply is not None and ask.reply["type"] == "accepted"
        and not ask.reply.get("duplicate")
    }  # fmt: skip
    for reading in facts.history.readings:
        for at, raw in reading.lines if reading.carrier == "websocket" else ():
            line = decode(raw)
            ask = first.get((reading.client, reading.connection, line["turn"]))
            if ask is not None and ask.replied_at is not None and at < ask.replied_at:
                text = f"a record of {line['turn']} came before `accepted` to {_who(facts, ask)}"
                yield Violation("G2", reading.session, text, (raw[:300],))
                break


def _results(facts: Facts) -> Iterator[tuple[Ask, str, str]]:
    for ask in facts.asks.get("cancel", ()):
        if ask.reply is not None and ask.reply["type"] == "cancelled":
            for each in ask.reply["turns"]:
                yield ask, each["turn"], each["result"]


def _who(facts: Facts, ask: Ask) -> str:
    at = (ask.replied_at or 0) - facts.history.began_at
    return f"{ask.client}#{ask.connection} (node {ask.node}, at {at:.3f})"
