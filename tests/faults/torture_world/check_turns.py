"""G3, G5, G6, G7: one generation per send, one writer, one end, and the end that it should have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tests.faults.torture_world.checker import RUNS, Facts, Told, Violation
from tests.faults.torture_world.explain import (
    cancels_of,
    describe,
    end_may_be_lost,
    may_be_lost,
    node_faults_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.torture_world.history import Request

CLOSERS = ({"type": "text-end", "id": "t"},)
KINDS = {"turn-start": "s", "chunk": "c", "turn-end": "e"}


def each_send_is_one_request(facts: Facts) -> Iterator[Violation]:
    """G3: however often a turn is sent, the backend hears of it once."""
    for turn, requests in facts.requests.items():
        if len(requests) > 1:
            times = [f"{request.arrived_at - facts.history.began_at:.3f}" for request in requests]
            asks = [describe(facts, ask) for ask in facts.sends.get(turn, ())]
            text = f"the backend was asked {len(requests)} times for {turn}, at {', '.join(times)}"
            yield Violation("G3", requests[0].session, text, tuple(asks))


def each_turn_is_told(facts: Facts) -> Iterator[Violation]:
    """G7: what was accepted, or asked of the backend, is in the last reading."""
    accepted = {
        (ask.command["session"], ask.command["turn"]): ask
        for ask in facts.asks.get("send", ())
        if ask.reply is not None and ask.reply["type"] == "accepted"
    }
    asked = {(each.session, turn): each for turn, requests in facts.requests.items() for each in requests}
    for session, turn in sorted({*accepted, *asked}):
        if session in facts.finals and turn not in facts.turns_of(session, facts.final_epoch(session)):
            if may_be_lost(facts, turn):
                continue
            around = [describe(facts, ask) for ask in facts.sends.get(turn, ())]
            yield Violation(
                "G7", session, f"{turn} was accepted, or begun, and nothing tells of it", tuple(around)
            )


def each_turn_ends_once(facts: Facts) -> Iterator[Violation]:
    """G6, G7: one start, then its chunks, then one end; and nothing runs any more."""
    for session in facts.journals:
        final = facts.final_epoch(session)
        for epoch in whole_epochs(facts, session):
            for turn, told in facts.turns_of(session, epoch).items():
                kinds = "".join(KINDS[each.line["type"]] for each in told)
                # Of another epoch, parts may have been seen by nobody.
                shape = "sc*e" if epoch == final else "s?c*e?"
                if not re.fullmatch(shape, kinds):
                    text = f"{turn} is not one start, its chunks and one end but {_runs_of(kinds)}"
                    yield Violation("G7", session, text, _last(told))
    for last in facts.history.finals:
        for status in last.turns:
            if status["state"] in RUNS:
                text = f"{status['turn']} is {status['state']} at the end, says node {last.node}"
                yield Violation("G7", last.session, text)


def each_turn_is_what_the_backend_wrote(facts: Facts) -> Iterator[Violation]:
    """G6: its chunks are the first of those that the backend wrote, each once and in order."""
    for session in facts.journals:
        final = facts.final_epoch(session)
        for epoch in whole_epochs(facts, session):
            for turn, told in facts.turns_of(session, epoch).items():
                chunks = [_as_written(each.line) for each in told if each.line["type"] == "chunk"]
                written = [chunk for request in facts.requests.get(turn, ()) for chunk in request.written]
                is_final = epoch == final
                end = told[-1].line
                wrong = _differs(chunks, written, end) if is_final else _out_of_order(chunks, written)
                if wrong is not None:
                    text = f"{turn} has {wrong}; {len(written)} chunks were written, {len(chunks)} are told"
                    yield Violation("G6", session, text, _last(told))


def each_end_is_as_it_should_be(facts: Facts) -> Iterator[Violation]:
    """G5, G7: `complete` if the backend finished, `cancelled` if asked for, `interrupted` by a lost node."""
    for session, final in facts.finals.items():
        for turn, told in facts.turns_of(session, facts.final_epoch(session)).items():
            end = told[-1].line
            if end["type"] != "turn-end":
                continue  # told above
            requests = facts.requests.get(turn, [])
            wrong = _wrong_end(facts, session, turn, end, requests)
            if wrong:
                sends, cancels = facts.sends.get(turn, ()), cancels_of(facts, session, turn)
                asks = [describe(facts, ask) for ask in (*sends, *cancels)]
                plan = requests[0].plan["end"] if requests else "never asked"
                text = f"{turn} ended {end['reason']} {end.get('error', '')}, and {wrong}; planned: {plan}"
                yield Violation(
                    "G5" if end["reason"] == "cancelled" else "G7", final.session, text, tuple(asks)
                )


def _wrong_end(facts: Facts, session: str, turn: str, end: dict[str, Any], requests: list[Request]) -> str:
    finished = any(request.finished_at is not None for request in requests)
    plan = requests[0].plan["end"] if requests else ""
    match end["reason"]:
        case "complete":
            return "" if finished and plan == "complete" else "the backend did not finish"
        case "cancelled":
            return "" if plan == "abort" or cancels_of(facts, session, turn) else "nobody cancelled"
        case "error":
            return _wrong_error(end["error"]["code"], plan)
        case "interrupted":
            lost = node_faults_of(facts, turn) or end_may_be_lost(facts, turn)
            return "" if lost else "no fault befell its node"
        case other:
            return f"{other} is no reason"


def _wrong_error(code: str, plan: str) -> str:
    expected = {
        "error": {"upstream-error"},
        "cut": {"upstream-cut-off"},
        "refuse": {"upstream-refused"},
        "hang": {"upstream-timeout"},
    }.get(plan, set())
    # A backend that drops the connection at once may be too fast for its head to be read.
    expected |= {"upstream-unreachable"} if plan == "cut" else set()
    return "" if code in expected else f"{code} is not what was planned"


def each_node_that_was_told_to_stop_has(facts: Facts) -> Iterator[Violation]:
    """A drain ends: at the latest when GATEWAY_DRAIN is over, and as it should."""
    for fault in facts.history.faults:
        if fault.kind == "drain" and not fault.note.startswith("ended with status 0 "):
            at = fault.at - facts.history.began_at
            yield Violation("drain", "", f"node {fault.slot}, told to stop at {at:.3f}, {fault.note}")


def whole_epochs(facts: Facts, session: str) -> list[str]:
    """Those of which one history is known: the last one, and those that did not fork."""
    final = facts.final_epoch(session)
    return [
        epoch for epoch in facts.journals[session] if epoch == final or (session, epoch) not in facts.forks
    ]


# -- comparing chunks


def _as_written(line: dict[str, Any]) -> Any:
    """A chunk without what docs/protocol.md §4 adds to it."""
    data = line.get("data", line.get("text"))
    if isinstance(data, dict) and data.get("type") == "start":
        return {name: value for name, value in data.items() if name != "messageId"}
    return data


def _differs(chunks: list[Any], written: list[Any], end: dict[str, Any]) -> str | None:
    same = next((i for i, (a, b) in enumerate(zip(chunks, written, strict=False)) if a != b), None)
    if same is None:
        same = min(len(chunks), len(written))
    rest = chunks[same:]
    if rest and not (end.get("reason") == "cancelled" and all(chunk in CLOSERS for chunk in rest)):
        return f"{str(rest[0])[:120]} as chunk {same} where {str(written[same : same + 1])[:120]} was written"
    if end.get("reason") == "complete" and same < len(written):
        return f"only the first {same} chunks, and is complete"
    return None


def _out_of_order(chunks: list[Any], written: list[Any]) -> str | None:
    """For an epoch of which only parts may have been seen."""
    deltas = [chunk for chunk in chunks if chunk.get("type") == "text-delta"]
    places = [written.index(delta) if delta in written else -1 for delta in deltas]
    if -1 in places:
        return "a chunk that was not written"
    return None if places == sorted(set(places)) else f"chunks in the order {places}"


def _runs_of(kinds: str) -> str:
    names = {"s": "start", "c": "chunk", "e": "end"}
    short = [f"{names[kind]}" for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]
    return ", ".join(short)


def _last(told: list[Told]) -> tuple[str, ...]:
    return tuple(f"{each.by}: {each.raw[:220]}" for each in told[-5:])
