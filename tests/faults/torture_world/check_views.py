"""G1 and G2: every view is a gapless, duplicate-free reading of one order, and what was seen stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.torture_world.checker import RUNS, Facts, Violation, lines_around
from tests.faults.torture_world.history import epoch_of, offset_of
from tests.faults.torture_world.recorder import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.torture_world.history import Reading

STARTS = frozenset({"start", "running", "send"})


def each_view_is_dense(facts: Facts) -> Iterator[Violation]:
    """G2: after the place told, each offset once and in order, and all of one epoch."""
    for reading in (*facts.history.readings, *facts.history.finals):
        expected, epoch = reading.offset + 1, epoch_of(reading.cursor)
        for index, (_, raw) in enumerate(reading.lines):
            line = decode(raw)
            found = epoch_of(line["cursor"])
            text = ""
            if line["offset"] != expected:
                kind = "a gap" if line["offset"] > expected else "again"
                text = f"{kind}: {reading.name} was told {line['offset']} where {expected} is next"
            elif found != epoch and (epoch or reading.offset):
                text = f"another epoch without a resync: {reading.name} at offset {line['offset']}"
            elif offset_of(line["cursor"]) != line["offset"] or line["session"] != reading.session:
                text = f"the cursor is not of its record: {reading.name}"
            if text:
                yield Violation("G2", reading.session, text, _around(facts, reading, index))
                break
            expected, epoch = expected + 1, found


def _around(facts: Facts, reading: Reading, index: int) -> tuple[str, ...]:
    began_at = facts.history.began_at
    asked = f"asked {reading.asked}, told {reading.cursor} at {reading.at - began_at:.3f}"
    return (asked, *lines_around(reading.lines, index, began_at))


def each_view_begins_where_it_was_asked_to(facts: Facts) -> Iterator[Violation]:
    """G2: after the cursor handed back; or it is a resync, and from a complete state."""
    for reading in (*facts.history.readings, *facts.history.finals):
        wrong = _wrong_place(reading, facts)
        if wrong:
            text = f"{reading.name} asked {reading.asked} and was told {reading.cursor}: {wrong}"
            yield Violation("G2", reading.session, text, (f"last {reading.last}, turns {reading.turns}",))


def _wrong_place(reading: Reading, facts: Facts) -> str:
    wrong = ""
    if reading.resync is not None:
        # A poll that waited may have its session renewed under it; what is a push elsewhere is in its answer.
        may_be_pushed = reading.carrier == "long-poll" and facts.history.lost_something
        if reading.asked in STARTS and not may_be_pushed:
            wrong = f"resync {reading.resync} where nothing was to be continued"
        elif reading.offset != 0:
            wrong = "resync, but not from the first record"
        return wrong
    match reading.asked:
        case "start":
            wrong = "not from the first record" if reading.offset else ""
        case "running":
            running = [turn["offset"] for turn in reading.turns if turn["state"] in RUNS]
            # An empty answer to a poll tells only where it ended.
            knows = reading.lines or reading.carrier != "long-poll"
            if running and knows and reading.offset != min(running) - 1:
                wrong = "not before the oldest running turn"
        case "send":
            pass
        case cursor if offset_of(cursor) != reading.offset:
            wrong = "another offset, and no resync"
        case cursor if epoch_of(cursor) not in {"", epoch_of(reading.cursor)}:
            wrong = "another epoch, and no resync"
        case _:
            pass
    return wrong


def nobody_is_told_who_is_not_attached(facts: Facts) -> Iterator[Violation]:
    """G2: no record comes after `resync`, the reply to `detach`, or before `attached`."""
    for who, raw in facts.history.strays:
        yield Violation("G2", "", f"{who} was told what it must not be: {raw[:300]}")


def what_was_seen_stays(facts: Facts) -> Iterator[Violation]:
    """G1: the last reading has it at the same offset, unless the epoch is another."""
    for session, epochs in facts.journals.items():
        final = facts.finals.get(session)
        if final is None:
            continue  # told as unreadable
        epoch = facts.final_epoch(session)
        there = {decode(raw)["offset"]: raw for _, raw in final.lines}
        has_lost = facts.history.lost_something  # who had what is gone is told `resync`, or two orders show
        for offset, told in sorted(epochs.get(epoch, {}).items()):
            if there.get(offset) != told.raw and not has_lost:
                text = f"offset {offset} was seen by {told.by} and is not in the last reading"
                around = (f"seen: {told.raw[:300]}", f"last: {there.get(offset, 'nothing')[:300]}")
                yield Violation("G1", session, text, around)
                break
        others = [other for other in epochs if other != epoch]
        if others and not facts.history.lost_something:
            first = next(iter(epochs[others[0]].values()))
            text = f"{len(others) + 1} epochs, though no fault lost anything"
            yield Violation("G1", session, text, (f"first: {first.by} {first.raw[:200]}", f"last: {epoch}"))


def nobody_is_told_resync_without_a_loss(facts: Facts) -> Iterator[Violation]:
    """G1: nothing is trimmed here, nobody falls that far behind, and the store forgets only by a failover."""
    for reading in facts.history.readings:
        for reason in (reading.resync, reading.reason):
            if reason is not None and not (reason == "epoch-changed" and facts.history.lost_something):
                at = reading.at - facts.history.began_at
                text = f"{reading.name} was told resync {reason} at {at:.3f}, though no fault lost anything"
                yield Violation("G1", reading.session, text, (f"asked {reading.asked}",))


def all_read_the_same_at_the_end(facts: Facts) -> Iterator[Violation]:
    """G1: whichever node is asked, the session is the same, whole."""
    for text in facts.history.unreadable:
        yield Violation("G1", "", f"unable to read at the end: {text}")
    for final in facts.history.finals:
        first = facts.finals[final.session]
        ours, theirs = [raw for _, raw in final.lines], [raw for _, raw in first.lines]
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            differs = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            who = f"nodes {first.node} and {final.node}"
            text = f"{who} tell different things at the end, from offset {differs + 1}"
            around = (
                *lines_around(first.lines, differs, facts.history.began_at),
                *lines_around(final.lines, differs, facts.history.began_at),
            )
            yield Violation("G1", final.session, text, around)


def who_stayed_has_everything(facts: Facts) -> Iterator[Violation]:
    """G2: a client that is attached is told what is journalled; nothing is only for those who come anew."""
    for reading in facts.history.readings:
        final = facts.finals.get(reading.session)
        if reading.ending == "open" and final is not None:
            had, last = reading.offset + len(reading.lines), final.offset + len(final.lines)
            if had < last:
                text = (
                    f"{reading.name} is attached and was never told the last {last - had} of {last} records"
                )
                yield Violation("G2", reading.session, text, (f"asked {reading.asked}",))
