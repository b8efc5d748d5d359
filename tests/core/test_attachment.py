from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.attachment import Attachment, GapError, Place, place
from gateway.core.model import Cursor, Draft, Record, RecordKind, ResyncReason, TurnId

E = "e1"
TURN = TurnId("t")


def records(first: int, last: int) -> list[Record]:
    return [
        Record(Cursor(E, offset, "aa", f"{offset:08x}"), TURN, Draft(RecordKind.CHUNK, b"%d" % offset))
        for offset in range(first, last + 1)
    ]


def offsets(taken: object) -> list[int]:
    assert isinstance(taken, (list, tuple))
    return [record.offset for record in taken]


CHANGED, TRIMMED = ResyncReason.EPOCH_CHANGED, ResyncReason.TRIMMED

# The journal holds 4..9, and offset 6 is of a turn with tag `aa`.
PLACES: list[tuple[str, Cursor | None, str, Place]] = [
    ("from the first record kept", None, "", Place(Cursor(E, 3))),
    ("in the middle", Cursor(E, 6, "aa"), "aa", Place(Cursor(E, 6, "aa"))),
    ("at the end", Cursor(E, 9, "aa"), "aa", Place(Cursor(E, 9, "aa"))),
    ("just before the first kept", Cursor(E, 3, "aa"), "", Place(Cursor(E, 3, "aa"))),
    ("one too early", Cursor(E, 2, "aa"), "", Place(Cursor(E, 3), TRIMMED)),
    ("from the beginning, which is gone", Cursor(E, 0), "", Place(Cursor(E, 3), TRIMMED)),
    ("from before the session was", Cursor("", 0), "", Place(Cursor(E, 3), TRIMMED)),
    ("beyond the end", Cursor(E, 10, "aa"), "", Place(Cursor(E, 3), CHANGED)),
    ("another epoch", Cursor("e0", 6, "aa"), "aa", Place(Cursor(E, 3), CHANGED)),
    ("another epoch, too early", Cursor("e0", 0), "", Place(Cursor(E, 3), CHANGED)),
    ("offset used again", Cursor(E, 6, "bb"), "aa", Place(Cursor(E, 3), CHANGED)),
    ("tag not known to the client", Cursor(E, 6), "aa", Place(Cursor(E, 6))),
    ("tag not known to the journal", Cursor(E, 6, "bb"), "", Place(Cursor(E, 6, "bb"))),
]


@pytest.mark.parametrize(("after", "tag", "found"), [pytest.param(*row[1:], id=row[0]) for row in PLACES])
def test_an_attach_begins_where_it_can_or_says_why_not(after: Cursor | None, tag: str, found: Place) -> None:
    """Never a partial recovery: a client continues exactly, or starts from a complete state."""
    assert place(after, epoch=E, last=9, base=4, tag=tag) == found


@pytest.mark.parametrize(
    ("had", "there", "found"),
    [
        ("11111111", "11111111", Place(Cursor(E, 6, "aa", "11111111"))),
        ("11111111", "22222222", Place(Cursor(E, 3), CHANGED)),
        ("", "22222222", Place(Cursor(E, 6, "aa", "22222222"))),
        ("11111111", "", Place(Cursor(E, 6, "aa", "11111111"))),
        ("", "", Place(Cursor(E, 6, "aa"))),
    ],
)
def test_a_place_in_another_history_is_a_resync(had: str, there: str, found: Place) -> None:
    """The same offset of the same turn: only the check says that what stood before is another thing."""
    assert place(Cursor(E, 6, "aa", had), epoch=E, last=9, base=4, tag="aa", check=there) == found


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (None, Place(Cursor("", 0))),
        (Cursor("", 0), Place(Cursor("", 0))),
        (Cursor(E, 0), Place(Cursor("", 0), CHANGED)),
        (Cursor(E, 5, "aa"), Place(Cursor("", 0), CHANGED)),
        (Cursor("", 5), Place(Cursor("", 0), CHANGED)),
    ],
)
def test_a_session_that_is_gone_is_told_to_who_knew_it(after: Cursor | None, found: Place) -> None:
    """After a flush of the store, silence would look like a chat in which nothing happens."""
    assert place(after, epoch="", last=0, base=1, tag="") == found


def test_a_client_from_before_the_first_record_sees_it() -> None:
    """It attached to a chat that did not exist yet, lost its socket, and came back after the first send."""
    assert place(Cursor("", 0), epoch=E, last=9, base=1, tag="") == Place(Cursor(E, 0))


@given(
    after=st.none()
    | st.builds(Cursor, st.sampled_from(["", E, "e0"]), st.integers(0, 12), st.sampled_from(["", "aa", "b"])),
    base=st.integers(1, 10),
    count=st.integers(0, 5),
    tag=st.sampled_from(["", "aa"]),
)
def test_a_place_is_inside_the_journal_and_unasked_only_with_a_reason(
    after: Cursor | None, base: int, count: int, tag: str
) -> None:
    """A place outside would be a gap at once, or a wait for ever."""
    last = base - 1 + count
    found = place(after, epoch=E, last=last, base=base, tag=tag)
    assert found.cursor.epoch == E
    assert base - 1 <= found.cursor.offset <= last
    if found.resync is not None or after is None:
        assert found.cursor.offset == base - 1
    else:
        assert found.cursor.offset == after.offset


@pytest.mark.parametrize(
    ("had", "first", "last", "taken"),
    [
        (0, 1, 3, [1, 2, 3]),
        (2, 1, 4, [3, 4]),
        (3, 1, 3, []),
        (5, 1, 3, []),
        (2, 3, 3, [3]),
        (7, 1, 0, []),
    ],
)
def test_what_was_had_is_not_handed_out_again(had: int, first: int, last: int, taken: list[int]) -> None:
    """Live is registered before the backlog is read, so the two overlap."""
    attachment = Attachment(Cursor(E, had))
    assert attachment.check == ""
    assert offsets(attachment.take(records(first, last))) == taken
    assert attachment.offset == max([had, *taken])
    assert attachment.check == (f"{attachment.offset:08x}" if taken else "")
    assert attachment.epoch == E


def test_a_gap_is_an_error_and_takes_nothing() -> None:
    """A record that is skipped is lost to the client for ever."""
    attachment = Attachment(Cursor(E, 2))
    with pytest.raises(GapError, match="unable to continue after 2; 4 came next"):
        attachment.take(records(4, 5))
    assert (attachment.offset, attachment.check) == (2, "")
    assert offsets(attachment.take(records(3, 5))) == [3, 4, 5]


@given(
    start=st.integers(0, 20),
    batches=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 8)), max_size=20),
)
def test_however_catch_up_and_live_overlap_each_offset_is_had_once_and_in_order(
    start: int, batches: list[tuple[int, int]]
) -> None:
    """G2: the client's array is the journal's, whatever races on the way."""
    attachment = Attachment(Cursor(E, start))
    seen: list[int] = []
    for first, size in batches:
        batch = records(first, first + size - 1)
        had = start + len(seen)
        if size and first > had + 1:
            with pytest.raises(GapError):
                attachment.take(batch)
        else:
            seen += offsets(attachment.take(batch))
            assert not size or start + len(seen) >= first + size - 1
        assert seen == list(range(start + 1, start + 1 + len(seen)))
        assert attachment.offset == start + len(seen)
