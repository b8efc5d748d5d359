"""The tail: what was just journalled, for those who are attached here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import tail as tail_module
from gateway.core.attachment import Attachment
from gateway.core.model import Cursor, Draft, Record, RecordKind, SessionId, TurnId, next_check
from gateway.core.tail import Tail

if TYPE_CHECKING:
    from collections.abc import Sequence

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


# -- one history


def history(count: int, *, word: str = "x", after: Sequence[Record] = ()) -> list[Record]:
    """Records with their checks, from the first on, or going on after others."""
    found = list(after)
    for number in range(len(found) + 1, len(found) + count + 1):
        payload = f"{word}{number}".encode()
        check = next_check(found[-1].cursor.check if found else "", TURN, "c", payload)
        found.append(Record(Cursor("aa", number, "", check), TURN, Draft(RecordKind.CHUNK, payload)))
    return found


def test_records_of_another_history_are_refused() -> None:
    """A failover lost some, others were written at their offsets: nobody is shown both (G1)."""
    ours = history(6)
    theirs = history(4, word="y", after=ours[:4])
    tail = Tail(SessionId("s"))
    assert tail.add(ours[2:])
    assert not tail.add(theirs[4:])
    assert not tail.add(theirs[2:])
    assert tail.records == ours[2:]
    assert (tail.last, tail.check) == (6, ours[5].cursor.check)
    assert tail.add(ours[1:4])
    assert tail.add(history(1, after=ours)[5:])
    assert tail.last == 7


@pytest.mark.parametrize("offset", range(8))
def test_it_is_told_who_has_had_another_record(offset: int) -> None:
    """Before the first that is here, at each, and at the last; where nothing is known nothing is said."""
    ours, theirs = history(7), history(7, word="y")
    tail = Tail(SessionId("s"))
    tail.skip_to(2, "aa", ours[1].cursor.check)
    assert tail.add(ours[2:6])
    known = 2 <= offset <= 6
    check, other = (found[offset - 1].cursor.check if offset else "" for found in (ours, theirs))
    assert tail.disagrees(offset, other) is known
    assert not tail.disagrees(offset, check)
    assert not tail.disagrees(offset, "")


def test_a_tail_without_records_knows_its_end() -> None:
    """Somebody looked, and nothing was written since."""
    tail = Tail(SessionId("s"))
    assert not tail.disagrees(3, "11111111")
    tail.skip_to(3, "aa", "11111111")
    assert not tail.disagrees(3, "11111111")
    assert tail.disagrees(3, "22222222")
    assert not tail.disagrees(2, "22222222")
    assert not tail.disagrees(4, "22222222")


def test_what_is_dropped_leaves_its_check() -> None:
    """Who has had the newest record that was dropped still finds what follows it here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_module, "TAIL_BYTES", 1000)
        ours = history(40)
        tail = Tail(SessionId("s"))
        for record in ours:
            assert tail.add([record])
        first = tail.records[0].offset
        assert tail.before == ours[first - 2].cursor.check
        assert tail.disagrees(first - 1, "11111111")


def test_it_knows_which_turns_run() -> None:
    """A session in which one runs is looked at more often."""
    other = TurnId("u")
    drafts = [
        (TURN, RecordKind.TURN_START), (other, RecordKind.TURN_START), (TURN, RecordKind.CHUNK),
        (TURN, RecordKind.TURN_END), (other, RecordKind.TURN_END),
    ]  # fmt: skip
    tail, running = Tail(SessionId("s")), []
    for offset, (turn, kind) in enumerate(drafts, start=1):
        tail.add([Record(Cursor("aa", offset), turn, Draft(kind, b""))])
        running.append(set(tail.running))
    assert running == [{TURN}, {TURN, other}, {TURN, other}, {other}, set()]
    joined = Tail(SessionId("s"))
    joined.add(records(5, 2))
    assert joined.running == {TURN}
    tail.skip_to(9, "aa", "", [TURN])
    assert tail.running == {TURN}


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "publish", "lose", "ask", "answer", "skip", "take", "take"]),
        st.integers(0, 2),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(_STEPS)
def test_every_reader_gets_every_record_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    """Whatever comes first: a publication, one that is lost, a page asked for long ago, or a look (G2)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_module, "TAIL_BYTES", 700)
        _interleave(steps)


def _interleave(steps: list[tuple[str, int]]) -> None:  # noqa: C901 - an arm for each step
    journal: list[Record] = []
    unpublished: list[list[Record]] = []
    pages: list[list[Record]] = []
    readers = [Attachment(Cursor("aa", 0)) for _ in range(3)]
    had: list[list[Record]] = [[], [], []]
    tail = Tail(SessionId("s"))
    tail.skip_to(0, "aa")

    def take(which: int) -> None:
        assert not tail.disagrees(readers[which].offset, readers[which].check)
        found = tail.after(readers[which].offset)
        if not found:
            found = journal[readers[which].offset :][:4]
            assert not (found and tail.contradicts(found))
        had[which] += readers[which].take(found)

    for step, number in [
        *steps,
        ("skip", 0),
        *[("take", which) for which in range(3)] * (2 + 3 * len(steps)),
    ]:
        match step:
            case "write":
                new = history(1 + number, after=journal)[len(journal) :]
                journal += new
                unpublished.append(new)
            case "publish" if unpublished:
                tail.add(unpublished.pop(0))
            case "lose" if unpublished:
                unpublished.pop(0)
            case "ask":
                pages.append(journal[tail.last :][:5])
            case "answer" if pages:
                page = pages.pop(number % len(pages))
                assert not page or tail.add(page) or page[0].offset > (tail.last or 0) + 1
            case "skip" if len(journal) > (tail.last or 0):
                tail.skip_to(len(journal), "aa", journal[-1].cursor.check)
            case "take":
                take(number)
            case _:
                pass
        assert tail.records == journal[(tail.last or 0) - len(tail.records) : tail.last]
        assert tail.size == sum(record.size for record in tail.records)
    assert had == [journal] * 3
