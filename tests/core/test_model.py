from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import (
    MAX_SESSION_ID_BYTES,
    RECORD_OVERHEAD_BYTES,
    RETRYABLE,
    CloseCode,
    Cursor,
    Draft,
    ErrorCode,
    Record,
    RecordKind,
    Refusal,
    TurnId,
    bad_request,
    client_id,
    next_check,
    session_id,
    turn_id,
    turn_tag,
)

cursors = st.builds(
    Cursor,
    epoch=st.text("0123456789abcdef", max_size=32),
    offset=st.integers(0, 10**15 - 1),
    tag=st.text("0123456789abcdef", max_size=6),
    check=st.just("") | st.text("0123456789abcdef", min_size=8, max_size=8),
)


@pytest.mark.parametrize(
    ("cursor", "text"),
    [
        (Cursor("", 0), ".0."),
        (Cursor("9f", 7, "abc123"), "9f.7.abc123"),
        (Cursor("9f", 7, "abc123", "01234567"), "9f.7.abc123.01234567"),
        (Cursor("9f", 7, "", "01234567"), "9f.7..01234567"),
        (Cursor("0" * 32, 10**15 - 1, "ffffff"), f"{'0' * 32}.999999999999999.ffffff"),
    ],
)
def test_a_cursor_is_handed_back_unchanged(cursor: Cursor, text: str) -> None:
    """Clients of one release hand their cursors to the next one."""
    assert str(cursor) == text
    assert Cursor.parse(text) == cursor


@given(cursor=cursors)
def test_every_cursor_is_read_as_it_was_written(cursor: Cursor) -> None:
    """A place that reads back as another one is a gap or a double."""
    assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "7",
        "9f.7",
        "9f..abc123",
        f"9f.{2**63}.abc123",
        f"9f.{2**64}.abc123",
        f"9f.{10**15}.abc123",
        "9f." + "9" * 5000 + ".abc123",
        "9f.-1.abc123",
        "9f.+1.abc123",
        "9f.1e3.abc123",
        "9f.1_0.abc123",
        "9f.one.abc123",
        "9f.0x1.abc123",
        "9f.\u0667.abc123",
        "9f.\uff17.abc123",
        "9f.\u00b2.abc123",
        "9f. 7.abc123",
        " 9f.7.abc123",
        "9f.7.abc123\n",
        "9f.7.abc1234",
        "9f.7.ABC123",
        "9F.7.abc123",
        "xyz.7.abc123",
        "9f.7.abc123.1",
        "9f.7.abc123.",
        "9f.7.abc123.0123456",
        "9f.7.abc123.012345678",
        "9f.7.abc123.0123456G",
        "9f.7.abc123.ABCDEF01",
        "9f.7.abc123.01234567.",
        "9f.7.abc123.01234567\n",
        "9f.7.\0",
        "0" * 33 + ".7.abc123",
        "\ud800.7.abc123",
    ],
)
def test_what_is_no_cursor_is_refused(text: str) -> None:
    """A cursor comes from outside and goes into a command of the store."""
    with pytest.raises(Refusal, match="unable to use the cursor") as caught:
        Cursor.parse(text)
    assert caught.value.code is ErrorCode.BAD_REQUEST


@given(text=st.text(max_size=60))
def test_no_text_makes_a_cursor_of_a_wild_offset(text: str) -> None:
    """Redis' ids end at 2^64, and Lua's exact integers at 2^53."""
    try:
        cursor = Cursor.parse(text)
    except Refusal:
        return
    assert 0 <= cursor.offset < 2**53


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "{}",
        "{a}:meta",
        "/",
        "a/b",
        "../x",
        "...",
        "a b",
        " ",
        "%2e%2e",
        "*",
        "chat:1\\",
        "ö",
        "会话",
        "😀",
        "\u202e",
        "\u2028",
        "x" * MAX_SESSION_ID_BYTES,
        "ö" * (MAX_SESSION_ID_BYTES // 2),
    ],
)
def test_a_session_may_have_any_name(text: str) -> None:
    """The chat's id is the app's; no name reaches a key of the store."""
    assert session_id(text) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (".", "folder"),
        ("..", "folder"),
        ("a\0b", "control characters"),
        ("\n", "control characters"),
        ("a\x7f", "control characters"),
        ("a\x9b", "control characters"),
        ("x" * 4096, "4096 bytes"),
        ("x" * (MAX_SESSION_ID_BYTES + 1), "513 bytes"),
        ("ö" * (MAX_SESSION_ID_BYTES // 2) + "x", "513 bytes"),
        ("\ud83d", "half a surrogate pair"),
        ("a\ude00b", "half a surrogate pair"),
    ],
)
def test_a_name_that_no_wire_can_carry_is_refused_with_its_reason(text: str, why: str) -> None:
    """It would break a URL, a log line or an encoder later, where nobody can tell whose fault it was."""
    with pytest.raises(Refusal, match=f"^unable to use .*{why}") as caught:
        session_id(text)
    assert caught.value.code is ErrorCode.BAD_REQUEST


@given(text=st.text(st.characters(), max_size=200) | st.text(st.characters(categories=["Cs", "Cc", "So"])))
def test_a_session_id_is_what_came_or_a_refusal(text: str) -> None:
    """No name may crash a command, and none may be changed into another's."""
    try:
        named = session_id(text)
    except Refusal:
        return
    assert named == text
    assert 0 < len(named.encode()) <= MAX_SESSION_ID_BYTES
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", named)


@pytest.mark.parametrize("check", [turn_id, client_id])
@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("a", True),
        ("!~{}/..", True),
        ("550e8400-e29b-41d4-a716-446655440000", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a\n", False),
        ("\n", False),
        ("a\0", False),
        ("a\x7f", False),
        ("ö", False),
        ("\u0667", False),
        ("\ud800", False),
    ],
)
def test_small_ids_are_printable_ascii(check: type[str], text: str, *, fits: bool) -> None:
    """They go into headers, subprotocols and keys as they are."""
    if fits:
        assert check(text) == text
    else:
        with pytest.raises(Refusal, match=r"^unable to use the (turn|client) id; it must be 1 to 128"):
            check(text)


def test_a_tag_tells_turns_apart_and_fits_a_cursor() -> None:
    """An offset that was used again after a loss shows by the tag of its turn."""
    tags = {turn_tag(TurnId(f"turn-{number}")) for number in range(100)}
    assert len(tags) == 100
    assert all(Cursor.parse(str(Cursor("e", 1, tag))).tag == tag for tag in tags)
    assert turn_tag(TurnId("a")) == turn_tag(TurnId("a")) == "ca9781"


def test_a_check_stands_for_the_record_and_all_before_it() -> None:
    """Two histories that differ anywhere differ in the check of every record from there on."""
    first = next_check("", TurnId("t"), "c", b"x")
    assert first == hashlib.sha1(b"t\0c\0x", usedforsecurity=False).hexdigest()[:8]
    second = next_check(first, TurnId("t"), "c", b"x")
    assert second == hashlib.sha1(first.encode() + b"t\0c\0x", usedforsecurity=False).hexdigest()[:8]
    others = {
        next_check("", TurnId("u"), "c", b"x"),
        next_check("", TurnId("t"), "cp", b"x"),
        next_check("", TurnId("t"), "c", b"y"),
        next_check("", TurnId("t"), "c", b""),
    }
    assert len(others | {first, second}) == 6
    assert Cursor.parse(str(Cursor("e", 1, "", first))).check == first


def test_only_what_may_pass_is_retryable() -> None:
    """A client that repeats what can never succeed is a loop."""
    assert {"busy", "rate-limited", "store-unavailable", "draining"} == RETRYABLE
    for code in ErrorCode:
        assert Refusal(code, "unable").retryable is (code in RETRYABLE)
    refusal = Refusal(ErrorCode.BUSY, "unable to x; y", retry_after_seconds=1.5)
    assert (str(refusal), refusal.message, refusal.retry_after_seconds) == ("unable to x; y",) * 2 + (1.5,)
    assert bad_request("unable").code is ErrorCode.BAD_REQUEST
    assert bad_request("unable").retry_after_seconds is None


def test_a_close_code_says_whether_to_come_back() -> None:
    """4000-4499 try again, 4500-4999 final: a client decides by the range alone."""
    again = {CloseCode.GOING_AWAY, CloseCode.HEARTBEAT_MISSED}
    assert all((4000 <= code <= 4499) is (code in again) and 4000 <= code <= 4999 for code in CloseCode)


def test_records_are_equal_whether_or_not_they_were_encoded() -> None:
    """Encodings are kept beside a record, once for all clients; they are no part of it."""
    record = Record(Cursor("e", 3, "t"), TurnId("turn"), Draft(RecordKind.CHUNK, b"12345"))
    encoded = Record(record.cursor, record.turn, record.draft, line=b"x", event=b"y")
    assert record == encoded
    assert (record.offset, record.kind, record.size) == (3, RecordKind.CHUNK, 5 + RECORD_OVERHEAD_BYTES)
