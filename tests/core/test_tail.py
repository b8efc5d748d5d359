"""The tail: what was just journalled, for those who are attached here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import tail as tail_module
from gateway.core.model import Cursor, Draft, Record, RecordKind, SessionId, TurnId
from gateway.core.tail import Tail

TURN = TurnId("t")


def records(first: int, count: int, *, epoch: str = "aa", size: int = 10) -> list[Record]:
    """Dense records from an offset on."""
    draft = Draft(RecordKind.CHUNK, b"x" * size)
    return [Record(Cursor(epoch, first + number), TURN, draft) for number in range(count)]


def offsets(found: object) -> list[int] | None:
    """What was taken, in short."""
    return None if found is None else [record.offset for record in found]  # type: ignore[attr-defined]


def test_a_new_tail_begins_where_the_first_records_are() -> None:
    """Nobody has looked at the journal yet, and what comes is its newest."""
    tail = Tail(SessionId("s"))
    assert tail.add(records(5, 2))
    assert (tail.epoch, tail.last) == ("aa", 6)
    assert offsets(tail.after(4)) == [5, 6]
    assert offsets(tail.after(5)) == [6]
    assert offsets(tail.after(6)) == []


def test_what_is_not_here_any_more_is_told_from_nothing_new() -> None:
    """Who takes the one for the other stops for ever, or reads the journal for ever."""
    tail = Tail(SessionId("s"))
    assert tail.after(0) is None
    tail.add(records(5, 2))
    assert tail.after(3) is None


@pytest.mark.parametrize(
    ("first", "epoch"), [(8, "aa"), (7, "bb"), (1, "bb")], ids=["a gap", "a new epoch", "begun again"]
)
def test_what_does_not_follow_on_is_refused(first: int, epoch: str) -> None:
    """Only the journal knows what is in between."""
    tail = Tail(SessionId("s"))
    tail.add(records(5, 2))
    assert not tail.add(records(first, 1, epoch=epoch))
    assert offsets(tail.after(4)) == [5, 6]


def test_a_session_that_was_not_there_may_begin() -> None:
    """It had no epoch when somebody looked."""
    tail = Tail(SessionId("s"))
    tail.skip_to(0, "")
    assert tail.add(records(1, 1))
    assert tail.epoch == "aa"


def test_a_skip_forgets_what_no_longer_joins() -> None:
    """Handing out records across a hole would be a gap."""
    tail = Tail(SessionId("s"))
    tail.add(records(1, 3))
    tail.skip_to(9, "aa")
    assert tail.after(2) is None
    assert tail.add(records(10, 1))
    assert offsets(tail.after(9)) == [10]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), max_size=40), st.integers(100, 5_000))
def test_the_bound_holds_and_the_newest_stay(batches: list[tuple[int, int]], bound: int) -> None:
    """Whatever overlaps: dense, within the bound, and never without the newest record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_module, "TAIL_BYTES", bound)
        tail = Tail(SessionId("s"))
        last = 0
        for overlap, count in batches:
            first = max(1, last + 1 - overlap)
            assert tail.add(records(first, count))
            last = max(last, first + count - 1)
            assert tail.last == last
            held = [record.offset for record in tail.records]
            assert held == list(range(held[0], last + 1))
            assert tail.size == sum(record.size for record in tail.records)
            assert tail.size <= bound or len(tail.records) == 1
