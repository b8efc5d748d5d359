from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import Cursor, Draft, Record, RecordKind, Refusal, TurnId
from gateway.core.wire import AttachFrom, TurnStatus
from gateway.edge.commands import PIECE_BYTES, in_pieces, read_to_their_end, wanted_place


@pytest.mark.parametrize(
    ("after", "start", "place"),
    [
        (None, None, AttachFrom.START),
        (None, AttachFrom.START, AttachFrom.START),
        (None, AttachFrom.RUNNING, AttachFrom.RUNNING),
        ("ab.7.123456", None, Cursor("ab", 7, "123456")),
        (".0.", None, Cursor("", 0)),
    ],
)
def test_a_place_is_a_cursor_or_a_start(
    after: str | None, start: AttachFrom | None, place: Cursor | AttachFrom
) -> None:
    """A client that has nothing says where to begin; one that has something continues."""
    assert wanted_place(after, start) == place


@pytest.mark.parametrize(
    ("after", "start"), [("", None), ("x", None), (".0.", AttachFrom.START), (".0.", AttachFrom.RUNNING)]
)
def test_a_place_that_is_none_is_refused(after: str, start: AttachFrom | None) -> None:
    """A guess would lose records, or tell them twice."""
    with pytest.raises(Refusal, match=r"^unable to "):
        wanted_place(after, start)


@given(parts=st.lists(st.sampled_from([b"a", b"b" * 40_000, b"c" * PIECE_BYTES, b"d" * (PIECE_BYTES + 1)])))
def test_what_is_written_at_once_is_small_enough_for_a_slow_network(parts: list[bytes]) -> None:
    """Whoever takes a piece in two heartbeats is not taken for stuck; nothing is lost by it or cut apart."""
    pieces = list(in_pieces(parts, b"\n"))
    assert [line for piece in pieces for line in piece.split(b"\n")] == parts
    for piece in pieces:
        assert sum(map(len, piece.split(b"\n"))) <= PIECE_BYTES or b"\n" not in piece
    for piece, following in pairwise(pieces):
        assert len(piece) + len(following.split(b"\n")[0]) >= PIECE_BYTES


def record(offset: int, turn: str, kind: RecordKind) -> Record:
    return Record(Cursor("e", offset), TurnId(turn), Draft(kind, b""))


def test_only_an_end_counts_as_read_and_only_of_a_turn_that_is_news() -> None:
    """Who reads a year of chat has not read to its end what was told before it came."""
    start, chunk, end = RecordKind.TURN_START, RecordKind.CHUNK, RecordKind.TURN_END
    records = [
        record(3, "old", end),
        record(4, "a", start),
        record(5, "b", start),
        record(6, "b", chunk),
        record(7, "b", end),
        record(8, "a", end),
        record(9, "later", end),
    ]
    told = [TurnStatus(TurnId("b"), "running", 5), TurnStatus(TurnId("a"), "complete", 4)]
    assert read_to_their_end(told, records) == ["b", "a", "later"]
    assert read_to_their_end([], records) == ["old", "b", "a", "later"]
    assert read_to_their_end(told, records[1:4]) == []
