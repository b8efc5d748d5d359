"""All rules, and the figures."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.faults.torture_world import check_commands, check_turns, check_views
from tests.faults.torture_world.checker import Facts, Violation, collect
from tests.faults.torture_world.explain import slot_of
from tests.faults.torture_world.recorder import decode

if TYPE_CHECKING:
    from tests.faults.torture_world.history import History

RULES = (
    check_views.each_view_is_dense,
    check_views.each_view_begins_where_it_was_asked_to,
    check_views.nobody_is_told_who_is_not_attached,
    check_views.what_was_seen_stays,
    check_views.nobody_is_told_resync_without_a_loss,
    check_views.all_read_the_same_at_the_end,
    check_views.who_stayed_has_everything,
    check_turns.each_send_is_one_request,
    check_turns.each_turn_is_told,
    check_turns.each_turn_ends_once,
    check_turns.each_turn_is_what_the_backend_wrote,
    check_turns.each_end_is_as_it_should_be,
    check_turns.each_node_that_was_told_to_stop_has,
    check_commands.cancelled_means_closed,
    check_commands.a_cancel_before_its_send_is_remembered,
    check_commands.a_cancel_says_how_its_turn_ended,
    check_commands.a_send_is_accepted_just_before_its_turn,
)


def check(history: History) -> tuple[Facts, list[Violation]]:
    """Judge a history; no violation: it is as promised."""
    facts, violations = collect(history)
    for rule in RULES:
        violations += rule(facts)
    return facts, violations


def figures(facts: Facts) -> dict[str, object]:
    """What there was of it; nothing here is judged."""
    history = facts.history
    finals = [decode(raw) for final in facts.finals.values() for _, raw in final.lines]
    ends = [line for line in finals if line["type"] == "turn-end"]
    readings = history.readings
    replies = [ask.reply for asks in facts.asks.values() for ask in asks if ask.reply is not None]
    resyncs = Counter(reason for reading in readings for reason in (reading.resync, reading.reason) if reason)
    results = Counter(
        each["result"] for reply in replies if reply["type"] == "cancelled" for each in reply["turns"]
    )
    writes = [request.longest_write_seconds for request in history.requests]
    return {
        "turns by end": dict(Counter(line["reason"] for line in ends)),
        "turn errors": dict(Counter(line["error"]["code"] for line in ends if "error" in line)),
        "records": len(finals),
        "records told": sum(len(reading.lines) for reading in readings),
        "views": dict(Counter(reading.carrier for reading in readings)),
        "resumed by cursor": sum(reading.asked.count(".") > 0 and not reading.resync for reading in readings),
        "sessions with two histories of an epoch": len({session for session, _ in facts.forks}),
        "sessions by epochs": dict(Counter(len(epochs) for epochs in facts.journals.values())),
        "resyncs": dict(resyncs),
        "cancels": dict(results),
        "interrupting sends": sum(
            ask.command.get("overlap") == "interrupt" for ask in facts.asks.get("send", ())
        ),
        "commands without a reply": sum(ask.reply is None for ask in history.asks),
        "commands refused": dict(Counter(reply["code"] for reply in replies if reply["type"] == "error")),
        "backend requests": len(history.requests),
        "faults": dict(Counter(fault.kind for fault in history.faults)),
        "worst seal after a kill": _worst_seal(facts),
        "slowest write of the backend": f"{max(writes, default=0):.3f} s",
    }


def _worst_seal(facts: Facts) -> str:
    """From kill -9 to what the nodes logged as sealed; and without those that the store was away for."""
    history = facts.history
    worst = {True: 0.0, False: 0.0}
    for kill in history.faults if history.sealed else ():
        for turn, at in history.sealed.items() if kill.kind == "kill" else ():
            asked_at = min((ask.asked_at for ask in facts.sends.get(turn, ())), default=at)
            if slot_of(facts, turn) == kill.slot and asked_at <= kill.at <= at:
                disturbed = any(
                    fault.slot is None and fault.until >= kill.at and fault.at <= at
                    for fault in history.faults
                )
                worst[disturbed] = max(worst[disturbed], at - kill.at)
    return f"{worst[False]:.1f} s; with a fault of the store meanwhile {worst[True]:.1f} s"
