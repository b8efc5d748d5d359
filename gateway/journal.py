"""The journal: a session's ordered records in Redis, the only truth.

Every change is one Lua script, atomic, and may be repeated after an unknown outcome. All keys of a session
share one hash tag, a digest of its name, so every script works on a cluster and no name reaches a key.
This module turns what Redis answers into the nouns of ``core.model``; nothing above it sees raw replies.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.core.model import (
    Cursor,
    Draft,
    NodeId,
    Overlap,
    Record,
    RecordKind,
    SessionId,
    TurnId,
    turn_tag,
)
from gateway.outcomes import (
    Appended,
    AppendResult,
    BeginResult,
    Begun,
    BegunCancelled,
    Behind,
    Busy,
    Cancelling,
    CancelMark,
    Conflict,
    Duplicate,
    Ended,
    Fence,
    Fenced,
    Look,
    Lost,
    NotYet,
    Page,
    TurnLook,
)
from gateway.store import Argument, Store, StoreUnavailable, load_script

if TYPE_CHECKING:
    from collections.abc import Sequence

_BEGIN = load_script("begin")
_APPEND = load_script("append")
_END = load_script("end")
_CANCEL = load_script("cancel")
_ABORT = load_script("abort")
_START = load_script("start")
_TRIM = load_script("trim")
_READ = load_script("read")
_LOOK = load_script("look")
_MARK = load_script("mark")
_TURN = load_script("turn")
_TOUCH = load_script("touch")

SCRIPTS = (_BEGIN, _APPEND, _END, _CANCEL, _ABORT, _START, _TRIM, _READ, _LOOK, _MARK, _TURN, _TOUCH)

PAGE_BYTES = 512 * 1024
"""What one read brings at the most, give or take a record: some 5,000 chunks."""

NEWEST = -1
"""For :meth:`SessionJournal.look`: the newest offset, whichever it is."""

TOMBSTONE_SECONDS = 60.0
"""How long a cancel that came before its send is remembered (DESIGN: 60 s)."""


@dataclass(frozen=True, slots=True)
class _Keys:
    meta: str
    journal: str
    turns: str
    prefix: str

    def turn(self, turn: TurnId) -> str:
        # The same name as in lua/common.lua, where SHA-1 is the digest at hand.
        return f"{self.prefix}turn:{hashlib.sha1(turn.encode(), usedforsecurity=False).hexdigest()}"

    def all_of(self, turn: TurnId, user: str) -> tuple[str, ...]:
        return (self.meta, self.journal, self.turns, self.turn(turn), self.tombstone(turn, user))

    def tombstone(self, turn: TurnId, user: str) -> str:
        digest = hashlib.sha256(f"{user}\0{turn}".encode()).hexdigest()[:32]
        return f"{self.prefix}tombstone:{digest}"


@functools.lru_cache(maxsize=4096)
def _session_keys(prefix: str, session: SessionId) -> _Keys:
    digest = hashlib.sha256(session.encode()).digest()[:16]
    start = f"{prefix}:{{{base64.urlsafe_b64encode(digest).decode().rstrip('=')}}}:"
    return _Keys(meta=f"{start}meta", journal=f"{start}journal", turns=f"{start}turns", prefix=start)


@functools.lru_cache(maxsize=4096)
def _turn_keys(prefix: str, session: SessionId, turn: TurnId) -> tuple[str, ...]:
    """What every append of a turn names."""
    keys = _session_keys(prefix, session)
    return keys.meta, keys.journal, keys.turns, keys.turn(turn)


class SessionJournal:
    """The verbs of the journal, for any session.

    Args:
        store: Open.
        prefix: Starts every key.
        ttl_seconds: How long a session outlives its last use.
        window_seconds: How long a turn's records outlive its end.
    """

    def __init__(self, store: Store, *, prefix: str, ttl_seconds: float, window_seconds: float) -> None:
        self._store = store
        self._prefix = prefix
        self._ttl = milliseconds(ttl_seconds)
        self._window = milliseconds(window_seconds)

    async def begin(
        self,
        session: SessionId,
        turn: TurnId,
        *,
        node: NodeId,
        token: str,
        new_epoch: str,
        digest: str,
        overlap: Overlap,
        path: str,
        user: str,
        start: Draft,
        cancelled: Draft,
    ) -> BeginResult:
        """Accept a send.

        Args:
            session: Made if it does not exist.
            turn: Named by the client, or minted for it.
            node: Who will produce it.
            token: Random; half of the fence.
            new_epoch: Random; taken if the journal has to be made.
            digest: Of path and body: the same turn id with another one is a conflict.
            overlap: What to do when another turn runs.
            path: The chat path.
            user: Who sends; owns the session if nobody does.
            start: The ``turn-start``.
            cancelled: The ``turn-end`` for the case that a cancel came first.

        Raises:
            StoreUnavailable: Nothing is known; repeat the same call.
        """
        keys = self._keys(session)
        reply = await self._store.writes.call(
            _BEGIN,
            keys.all_of(turn, user),
            (
                "", 0, new_epoch, turn, node, token, digest, overlap, self._ttl, path.encode(), user.encode(),
                stored_kind(start), start.payload, stored_kind(cancelled), cancelled.payload,
            ),
        )  # fmt: skip
        match reply[0]:
            case b"BEGUN":
                waits_for = tuple(TurnId(other.decode()) for other in reply[4:])
                return Begun(_cursor(reply, turn), Fence(reply[3], token), waits_for)
            case b"CANCELLED":
                return BegunCancelled(_cursor(reply, turn))
            case b"DUPLICATE":
                return Duplicate(_cursor(reply, turn), reply[3].decode())
            case b"CONFLICT":
                return Conflict()
            case b"BUSY":
                return Busy()
            case _:
                raise StoreUnavailable("unable to send; the journal is behind what was seen of it")

    async def append(
        self, session: SessionId, turn: TurnId, fence: Fence, *, index: int, drafts: Sequence[Draft]
    ) -> AppendResult:
        """Journal a turn's records from ``index`` on (0: the first after its start); it ignores those it has.

        Raises:
            StoreUnavailable: Nothing is known; repeat the same call.
        """
        arguments: list[Argument] = ["", 0, turn, fence.number, fence.token, index, self._ttl]
        return await self._append(_APPEND, session, turn, arguments, drafts)

    async def end(
        self,
        session: SessionId,
        turn: TurnId,
        fence: Fence,
        *,
        index: int,
        reason: str,
        drafts: Sequence[Draft],
        refusal: bytes = b"",
    ) -> AppendResult:
        """Journal what closes a turn and its ``turn-end``, the last of ``drafts``.

        Raises:
            StoreUnavailable: Nothing is known; repeat the same call.
        """
        arguments: list[Argument] = [
            "", 0, turn, fence.number, fence.token, index, self._ttl, reason, "", refusal,
        ]  # fmt: skip
        result = await self._append(_END, session, turn, arguments, drafts)
        keys = self._keys(session)
        self._store.writes.tell(_TRIM, (keys.meta, keys.journal, keys.turns), (self._window,))
        return result

    async def seal(
        self, session: SessionId, turn: TurnId, *, node: NodeId, reason: str, end: Draft, token: str = ""
    ) -> AppendResult:
        """End a turn whose node is gone; its fence is void from then on."""
        arguments: list[Argument] = ["", 0, turn, token or 0, "", "", self._ttl, reason, node, b""]
        return await self._append(_END, session, turn, arguments, (end,))

    async def cancel(
        self, session: SessionId, turn: TurnId, *, user: str, only_due: bool = False
    ) -> CancelMark:
        """Mark a turn as to be ended.

        Args:
            session: Whose.
            turn: Which.
            user: Who cancels; one user's wish does not touch another's turn of the same name.
            only_due: Only if an abort is pending and due.
        """
        keys = self._keys(session)
        reply = await self._store.writes.call(
            _CANCEL,
            (keys.turn(turn), keys.tombstone(turn, user)),
            (milliseconds(TOMBSTONE_SECONDS), "due" if only_due else "now"),
        )
        match reply[0]:
            case b"CANCELLING":
                return Cancelling(NodeId(reply[1].decode()))
            case b"ENDED":
                return Ended(reply[1].decode())
            case _:
                return NotYet()

    async def abort(self, session: SessionId, turn: TurnId, *, seconds: float | None) -> None:
        """Set the deadline of an ambiguous abort; ``None`` takes it back."""
        deadline = "" if seconds is None else milliseconds(seconds)
        await self._store.writes.call(_ABORT, (self._keys(session).turn(turn),), (deadline,))

    async def start(self, session: SessionId, turn: TurnId, fence: Fence) -> bool:
        """A queued turn may go to the backend now; False: it was cancelled or fenced meanwhile."""
        reply = await self._store.writes.call(_START, (self._keys(session).turn(turn),), (fence.token,))
        return bool(reply[0] == b"RUNNING")

    async def mark_read(self, session: SessionId, turn: TurnId) -> None:
        """Note that a client has read the turn to its end."""
        await self._store.writes.call(_MARK, (self._keys(session).turn(turn),), ())

    def touch(self, session: SessionId) -> None:
        """Somebody uses the session: keep it for GATEWAY_SESSION_TTL from now. Nobody waits for it."""
        keys = self._keys(session)
        self._store.writes.tell(_TOUCH, (keys.meta, keys.journal, keys.turns), (self._ttl,))

    async def look(self, session: SessionId, *, offset: int = 0) -> Look:
        """Where the session stands, and whose the record at ``offset`` (or :data:`NEWEST`) is."""
        keys = self._keys(session)
        epoch, last, base, turn, told = await self._store.reads.call(
            _LOOK, (keys.meta, keys.journal, keys.turns), (offset,)
        )
        turns = tuple(
            TurnLook(TurnId(name.decode()), state.decode(), first, NodeId(node.decode()), was_read=bool(read))
            for name, state, first, node, read in told
        )
        tag = turn_tag(TurnId(turn.decode())) if turn else ""
        return Look(epoch.decode(), last, base, tag, turns)

    async def turn(self, session: SessionId, turn: TurnId) -> TurnLook | None:
        """What is known of one turn."""
        state, node, first, refusal, _ = await self._store.reads.call(
            _TURN, (self._keys(session).turn(turn),), ()
        )
        if not state:
            return None
        return TurnLook(turn, state.decode(), first, NodeId(node.decode()), refusal=refusal)

    async def read(self, session: SessionId, *, after: int, limit_bytes: int = PAGE_BYTES) -> Page:
        """Records after an offset: at least one if there is one, and about ``limit_bytes`` at the most."""
        keys = self._keys(session)
        epoch, last, base, found = await self._store.reads.call(
            _READ, (keys.meta, keys.journal), (after, limit_bytes), reply_bytes=limit_bytes
        )
        text = epoch.decode()
        fields = iter(found)
        records = tuple(
            _record(text, after + number, turn, kind, payload)
            for number, (turn, kind, payload) in enumerate(zip(fields, fields, fields, strict=True), start=1)
        )
        return Page(text, last, base, records)

    async def _append(
        self,
        script: Any,
        session: SessionId,
        turn: TurnId,
        arguments: list[Argument],
        drafts: Sequence[Draft],
    ) -> AppendResult:
        for draft in drafts:
            arguments += (stored_kind(draft), draft.payload)
        reply = await self._store.writes.call(script, _turn_keys(self._prefix, session, turn), arguments)
        match reply[0]:
            case b"APPENDED":
                return Appended(reply[1].decode(), reply[2], reply[3], reply[4].decode())
            case b"BEHIND":
                return Behind(reply[1])
            case b"ENDED":
                return Ended(reply[1].decode())
            case b"FENCED":
                return Fenced()
            case _:
                return Lost()

    def _keys(self, session: SessionId) -> _Keys:
        return _session_keys(self._prefix, session)


def milliseconds(seconds: float) -> int:
    """Redis counts in them."""
    return max(1, round(seconds * 1000))


def stored_kind(draft: Draft) -> str:
    """Kind and flags as the journal keeps them."""
    flags = ("p" if draft.plain else "") + ("a" if draft.ai_sdk else "") + ("d" if draft.done else "")
    return draft.kind.value + flags


def _record(epoch: str, offset: int, turn: bytes, kind: bytes, payload: bytes) -> Record:
    name, tag = _named(turn)
    what, plain, ai_sdk, done = _read_kind(kind)
    return Record(Cursor(epoch, offset, tag), name, Draft(what, payload, plain, ai_sdk, done))


@functools.lru_cache(maxsize=4096)
def _named(turn: bytes) -> tuple[TurnId, str]:
    """A turn's id and tag; the same two for all its records."""
    name = TurnId(turn.decode())
    return name, turn_tag(name)


@functools.lru_cache(maxsize=64)
def _read_kind(stored: bytes) -> tuple[RecordKind, bool, bool, bool]:
    """What :func:`stored_kind` wrote: the kind, and the flags as :class:`Draft` takes them."""
    letters = stored.decode()
    return RecordKind(letters[0]), "p" in letters, "a" in letters, "d" in letters


def _cursor(reply: list[Any], turn: TurnId) -> Cursor:
    return Cursor(reply[1].decode(), reply[2], turn_tag(turn))
