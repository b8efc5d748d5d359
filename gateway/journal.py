"""The journal: a session's ordered records in Redis, the only truth.

Every change is one Lua script, atomic, and may be repeated after an unknown outcome. All keys of a session
share one hash tag, a digest of its name, so every script works on a cluster and no name reaches a key.
This module turns what Redis answers into the nouns of ``core.model``; nothing above it sees raw replies.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.core.model import (
    By,
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
from gateway.keys import session_keys, turn_keys
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
    Moved,
    NotYet,
    Page,
    RepairResult,
    Rewound,
    Seen,
    TurnLook,
)
from gateway.seen import SeenOffsets
from gateway.store import load_script

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.keys import SessionKeys
    from gateway.outcomes import Loss
    from gateway.store import Argument, Script, Shard, Store

_BEGIN = load_script("begin")
_APPEND = load_script("append")
_ASK = load_script("ask")
_REPAIR = load_script("repair")
_RENEW = load_script("renew")
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

SCRIPTS = (
    _BEGIN, _APPEND, _ASK, _END, _REPAIR, _RENEW, _CANCEL, _ABORT, _START, _TRIM, _READ, _LOOK, _MARK, _TURN,
    _TOUCH,
)  # fmt: skip

_BY = 7
"""Where the answer to an append tells who cancelled the turn."""

PAGE_BYTES = 128 * 1024
"""What one read brings at the most, give or take a record: some 1,000 chunks. A client that takes nothing
holds as much."""

NEWEST = -1
"""For :meth:`SessionJournal.look`: the newest offset, whichever it is."""

TOMBSTONE_SECONDS = 60.0
"""How long a cancel that came before its send is remembered (DESIGN: 60 s)."""


class SessionJournal:
    """The verbs of the journal, for any session.

    Args:
        store: Open.
        node: Who writes; told to who is rung.
        prefix: Starts every key.
        ttl_seconds: How long a session outlives its last use.
        window_seconds: How long a turn's records outlive its end.
    """

    def __init__(
        self, store: Store, *, node: NodeId, prefix: str, ttl_seconds: float, window_seconds: float
    ) -> None:
        self._store = store
        self._node = node
        self._prefix = prefix
        self._ttl = milliseconds(ttl_seconds)
        self._window = milliseconds(window_seconds)
        self._seen = SeenOffsets()

    def seen(self, session: SessionId) -> Seen:
        """The newest record of a session that this node has seen; of no epoch if none was."""
        return self._seen.get(session)

    async def begin(
        self,
        session: SessionId,
        turn: TurnId,
        *,
        token: str,
        new_epoch: str,
        digest: str,
        overlap: Overlap,
        path: str,
        by: By,
        start: Draft,
        cancelled: Draft,
    ) -> BeginResult:
        """Accept a send; this node will produce the turn.

        Args:
            session: Made if it does not exist.
            turn: Named by the client, or minted for it.
            token: Random; half of the fence.
            new_epoch: Random; taken if the journal has to be made.
            digest: Of path and body: the same turn id with another one is a conflict.
            overlap: What to do when another turn runs.
            path: The chat path.
            by: Who sends; owns the session if nobody does.
            start: The ``turn-start``.
            cancelled: The ``turn-end`` for the case that a cancel came first.

        Raises:
            StoreUnavailable: Nothing is known; repeat the same call.
        """
        keys = self._keys(session)
        reply = await self._store.writes.call(
            _BEGIN,
            (*turn_keys(self._prefix, session, turn), keys.tombstone(turn, by.user)),
            (
                *self._seen_arguments(session), turn, self._node, token, digest, overlap, self._ttl,
                path.encode(), by.user.encode(), stored_kind(start), start.payload, stored_kind(cancelled),
                cancelled.payload, new_epoch, _stored_by(by),
            ),
        )  # fmt: skip
        match reply[0]:
            case b"BEGUN":
                cursor = Cursor(reply[1].decode(), reply[2], turn_tag(turn), reply[3].decode())
                self._seen.note(session, cursor.epoch, cursor.offset, cursor.check)
                waits_for = tuple(TurnId(other.decode()) for other in reply[5:])
                return Begun(cursor, Fence(reply[4], token), waits_for)
            case b"CANCELLED":
                return BegunCancelled(_cursor(reply, turn))
            case b"DUPLICATE":
                return Duplicate(_cursor(reply, turn), reply[3].decode())
            case b"CONFLICT":
                return Conflict()
            case b"BUSY":
                return Busy()
            case _:
                return Rewound(reply[1].decode(), reply[2], 0)

    async def append(
        self, session: SessionId, turn: TurnId, fence: Fence, *, index: int, drafts: Sequence[Draft]
    ) -> AppendResult:
        """Journal a turn's records from ``index`` on (0: the first after its start); it ignores those it has.

        Without records it only asks how the turn stands.

        Raises:
            StoreUnavailable: Nothing is known; repeat the same call.
        """
        arguments: list[Argument] = [*self._seen_arguments(session), turn, fence.number, fence.token, index]
        keys = turn_keys(self._prefix, session, turn)
        if not drafts:
            return self._result(
                session, await self._store.writes.call(_ASK, (keys[0], keys[1], keys[3]), arguments)
            )
        arguments += (self._ttl, self._node)
        return self._result(session, await self._write(_APPEND, keys, arguments, drafts))

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
        after: int | None = None,
    ) -> AppendResult:
        """Journal what closes a turn and its ``turn-end``, the last of ``drafts``.

        Args:
            session: Whose.
            turn: Which.
            fence: The right to write it.
            index: How many of its records were journalled.
            reason: Why it ends.
            drafts: What closes it.
            refusal: What the backend answered instead of a stream, as JSON.
            after: Where these records stood before, if they were lost and are written again.

        Raises:
            StoreUnavailable: Nothing is known; repeat the same call.
        """
        arguments: list[Argument] = [
            *self._seen_arguments(session), turn, fence.number, fence.token, index, self._ttl, reason, "",
            refusal, self._node, "" if after is None else after,
        ]  # fmt: skip
        keys = turn_keys(self._prefix, session, turn)
        result = self._result(session, await self._write(_END, keys, arguments, drafts))
        self._store.writes.tell(_TRIM, keys[:3], (self._window,))
        return result

    async def seal(
        self, session: SessionId, turn: TurnId, *, node: NodeId, reason: str, end: Draft, token: str = ""
    ) -> AppendResult:
        """End a turn whose node is gone; its fence is void from then on."""
        arguments: list[Argument] = [
            *self._seen_arguments(session), turn, token or 0, "", "", self._ttl, reason, node, b"",
            self._node, "",
        ]  # fmt: skip
        keys = turn_keys(self._prefix, session, turn)
        return self._result(session, await self._write(_END, keys, arguments, (end,)))

    async def repair(
        self, session: SessionId, turn: TurnId, fence: Fence, *, loss: Loss, drafts: Sequence[Draft]
    ) -> RepairResult:
        """Write back what was lost of a turn, under its fence; only if the journal is as it was found.

        Args:
            session: Whose.
            turn: Which.
            fence: The right to write it.
            loss: What was found, and what is to be.
            drafts: From ``loss.index`` on; with the ``turn-start`` in front where ``loss.first`` is 0.

        Raises:
            StoreUnavailable: Nothing is known; look again.
        """
        arguments: list[Argument] = [
            loss.epoch, loss.last, loss.count, turn, fence.number, fence.token, loss.new_epoch, self._ttl,
            self._node, loss.digest, loss.path.encode(), loss.user.encode(), loss.first, loss.index,
            *self._seen_arguments(session),
        ]  # fmt: skip
        tombstone = self._keys(session).tombstone(turn, loss.user)
        keys = (*turn_keys(self._prefix, session, turn), tombstone)
        reply = await self._write(_REPAIR, keys, arguments, drafts)
        if reply[0] == b"MOVED":
            return Moved()
        result = self._result(session, reply)
        if isinstance(result, Appended | Rewound | Ended | Fenced):
            return result
        return Moved()

    async def renew(self, session: SessionId, new_epoch: str) -> bool:
        """Give the journal a new epoch if it has lost what this node has seen of it; what survived is kept.

        Returns:
            Whether this call did; not if another was quicker, or the journal is whole again.

        Raises:
            StoreUnavailable: Nothing is known; repeat it.
        """
        keys = self._keys(session)
        what, *_ = await self._store.writes.call(
            _RENEW,
            (keys.meta, keys.journal, keys.turns),
            (*self._seen_arguments(session), new_epoch, self._ttl, self._node),
        )
        return bool(what == b"RENEWED")

    async def cancel(self, session: SessionId, turn: TurnId, *, by: By, only_due: bool = False) -> CancelMark:
        """Mark a turn as to be ended.

        Args:
            session: Whose.
            turn: Which.
            by: Who cancels; one user's wish does not touch another's turn of the same name.
            only_due: Only if an abort is pending and due.
        """
        keys = self._keys(session)
        reply = await self._store.writes.call(
            _CANCEL,
            (keys.turn(turn), keys.tombstone(turn, by.user), keys.meta),
            (milliseconds(TOMBSTONE_SECONDS), "due" if only_due else "now", turn, _stored_by(by)),
        )
        match reply[0]:
            case b"CANCELLING":
                return Cancelling(NodeId(reply[1].decode()))
            case b"ENDED":
                return Ended(reply[1].decode())
            case _:
                return NotYet()

    async def abort(self, session: SessionId, turn: TurnId, *, by: By, seconds: float | None) -> None:
        """Set the deadline of an ambiguous abort; ``None`` takes it back."""
        deadline = "" if seconds is None else milliseconds(seconds)
        keys = self._keys(session)
        await self._store.writes.call(_ABORT, (keys.turn(turn), keys.meta), (deadline, turn, _stored_by(by)))

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
        epoch, last, base, turn, check, newest, told, rewound = await self._store.reads.call(
            _LOOK, (keys.meta, keys.journal, keys.turns), (*self._seen_arguments(session), offset)
        )
        turns = tuple(
            TurnLook(
                TurnId(name.decode()),
                state.decode(),
                first,
                NodeId(node.decode()),
                was_read=bool(read),
                abort_pending=bool(abort),
            )
            for name, state, first, node, read, abort in told
        )
        tag = turn_tag(TurnId(turn.decode())) if turn else ""
        if not rewound:
            self._seen.note(session, epoch.decode(), last, newest.decode())
        return Look(
            epoch.decode(), last, base, tag, turns, check.decode(), newest.decode(), rewound=bool(rewound)
        )

    async def turn(self, session: SessionId, turn: TurnId) -> TurnLook | None:
        """What is known of one turn."""
        state, node, first, refusal, abort, by = await self._store.reads.call(
            _TURN, (self._keys(session).turn(turn),), ()
        )
        if not state:
            return None
        found = NodeId(node.decode())
        return TurnLook(
            turn, state.decode(), first, found, refusal=refusal, abort_pending=bool(abort), by=_by(by)
        )

    async def read(
        self, session: SessionId, *, after: int, check: str = "", limit_bytes: int = PAGE_BYTES
    ) -> Page:
        """Records after an offset: at least one if there is one, and about ``limit_bytes`` at the most.

        Args:
            session: Whose.
            after: The last record had.
            check: Of that record, where it is known: no record is handed out that belongs to another history.
            limit_bytes: Of payloads.
        """
        keys = self._keys(session)
        epoch, last, base, newest, joins, found = await self._store.reads.call(
            _READ,
            (keys.meta, keys.journal),
            (*self._seen_arguments(session), after, limit_bytes, check),
            reply_bytes=limit_bytes,
        )
        text = epoch.decode()
        fields = iter(found)
        records = tuple(
            _record(text, after + number, its_check, turn, kind, payload)
            for number, (turn, kind, payload, its_check) in enumerate(
                zip(fields, fields, fields, fields, strict=True), start=1
            )
        )
        if joins:
            self._seen.note(session, text, last, newest.decode())
        return Page(text, last, base, records, bool(joins), newest.decode())

    async def _write(
        self, script: Script, keys: Sequence[str], arguments: list[Argument], drafts: Sequence[Draft]
    ) -> list[Any]:
        for draft in drafts:
            arguments += (stored_kind(draft), draft.payload)
        reply: list[Any] = await self._store.writes.call(script, keys, arguments)
        return reply

    def _result(self, session: SessionId, reply: list[Any]) -> AppendResult:
        match reply[0]:
            case b"APPENDED":
                epoch, check = reply[1].decode(), reply[6].decode()
                self._seen.note(session, epoch, reply[2], check)
                by = _by(reply[_BY]) if len(reply) > _BY else None
                return Appended(epoch, reply[2], reply[3], reply[4].decode(), reply[5].decode(), check, by)
            case b"BEHIND":
                return Behind(reply[1].decode(), reply[2], reply[3])
            case b"ENDED":
                return Ended(reply[1].decode())
            case b"FENCED":
                return Fenced()
            case b"REWOUND":
                return Rewound(reply[1].decode(), reply[2], reply[3])
            case _:
                return Lost(reply[1].decode(), reply[2], bool(reply[3]))

    def _seen_arguments(self, session: SessionId) -> tuple[str, int, str]:
        seen = self._seen.get(session)
        return seen.epoch, seen.offset, seen.check

    def shard_of(self, session: SessionId) -> Shard | None:
        """Which server has it, as far as is known: what waits for one must not wait for another."""
        return self._store.shard_of(self._keys(session).meta)

    def _keys(self, session: SessionId) -> SessionKeys:
        return session_keys(self._prefix, session)


def milliseconds(seconds: float) -> int:
    """Redis counts in them."""
    return max(1, round(seconds * 1000))


def _stored_by(by: By) -> bytes:
    return msgspec.json.encode(by)


def _by(stored: bytes) -> By | None:
    return msgspec.json.decode(stored, type=By) if stored else None


def stored_kind(draft: Draft) -> str:
    """Kind and flags as the journal keeps them."""
    flags = ("p" if draft.plain else "") + ("a" if draft.ai_sdk else "") + ("d" if draft.done else "")
    return draft.kind.value + flags


def _record(epoch: str, offset: int, check: bytes, turn: bytes, kind: bytes, payload: bytes) -> Record:  # noqa: PLR0917 - as they are read, 5,000 times a page
    name, tag = _named(turn)
    what, plain, ai_sdk, done = _read_kind(kind)
    return Record(Cursor(epoch, offset, tag, check.decode()), name, Draft(what, payload, plain, ai_sdk, done))


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
