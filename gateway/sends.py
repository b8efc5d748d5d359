"""The verb `send`: a turn is journalled, then shown, then asked of the backend; once for each turn id."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.answer import Assignment, Beginning
from gateway.core import wire
from gateway.core.model import (
    By,
    Cursor,
    Draft,
    EndCode,
    EndReason,
    ErrorCode,
    Overlap,
    Record,
    RecordKind,
    Refusal,
    SessionId,
    TurnError,
    TurnId,
)
from gateway.core.sendbody import turn_start
from gateway.core.turn import End
from gateway.outcomes import BeginResult, Begun, BegunCancelled, Busy, Conflict, Duplicate, Rewound
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from multidict import CIMultiDict

    from gateway.config import Config
    from gateway.core.sendbody import SendBody
    from gateway.endings import Endings
    from gateway.hub import Hub
    from gateway.journal import SessionJournal
    from gateway.lease import Lease
    from gateway.opening import Opening
    from gateway.repairs import Repairs
    from gateway.turns import RunningTurns
    from gateway.upstream import UpstreamClient

RETRY_AFTER_SECONDS = 1.0
"""What who was refused for now is told to wait."""

LET_GO_SECONDS = 5.0
"""How long an interrupting send waits for those it cancelled."""

MAX_UNSURE = 1000
"""Turns that an outage may leave begun or not; beyond them sends are refused without asking the store."""

START_RETRY_SECONDS = 0.2
UNDO_RETRY_SECONDS = 1.0

UNDO_GRACE_SECONDS = 3.0
"""Above what who was refused waits before it sends again: that comes first, and is then carried out."""


@dataclass(frozen=True, slots=True)
class SendRequest:
    """A send, parsed.

    Attributes:
        session: Of which session.
        turn: Named by the client, or minted for it.
        body: As it goes to the backend.
        path: The chat path, percent-encoded, with its query.
        headers: End to end, for the backend.
        by: Who.
        overlap: What to do when another turn runs.
        released: Given by a wire that can pass on an answer that is no stream; set when it has, or will not.
    """

    session: SessionId
    turn: TurnId
    body: SendBody
    path: str
    headers: CIMultiDict[str]
    by: By
    overlap: Overlap
    released: asyncio.Event | None = None

    @property
    def chat_path(self) -> str:
        """The path without its query, which may hold secrets."""
        return self.path.partition("?")[0]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn is journalled.

    Attributes:
        session: Whose.
        turn: Which.
        before: Just before its ``turn-start``.
        duplicate: It was begun by an earlier send.
        opening: What the backend answers with; ``None`` where this send did not start the turn, or it was
            cancelled before.
    """

    session: SessionId
    turn: TurnId
    before: Cursor
    duplicate: bool = False
    opening: asyncio.Future[Opening] | None = None


@dataclass(slots=True)
class _Unsure:
    """A turn that may have been begun.

    Attributes:
        token: Of the begin whose reply did not come.
        is_wanted: The same send has come again, and takes it up.
    """

    token: str
    is_wanted: bool = False


class Sends:
    """Accepts sends.

    Args:
        config: For policies and bounds.
        journal: Where turns begin.
        hub: Who is shown them.
        lease: Whose they are.
        turns: Where they run.
        upstream: Whom they ask.
        repairs: Where a journal that lost something is told of.
        endings: How turns of other nodes end.
    """

    def __init__(
        self,
        config: Config,
        *,
        journal: SessionJournal,
        repairs: Repairs,
        endings: Endings,
        hub: Hub,
        lease: Lease,
        turns: RunningTurns,
        upstream: UpstreamClient,
    ) -> None:
        self.draining = False
        self._config = config
        self._journal = journal
        self._repairs = repairs
        self._endings = endings
        self._hub = hub
        self._lease = lease
        self._turns = turns
        self._upstream = upstream
        self._beginning: dict[tuple[SessionId, TurnId], asyncio.Event] = {}
        self._unsure: dict[tuple[SessionId, TurnId], _Unsure] = {}
        """Turns that may have been begun by a send that was refused; each has one task that ends it."""

    def refuse_when_full(self) -> None:
        """Whether there is room for a send at all.

        Raises:
            Refusal: There is none, or the node stops.
        """
        if self.draining:
            message = "unable to send; this node is stopping, another takes it"
            raise Refusal(ErrorCode.DRAINING, message, retry_after_seconds=RETRY_AFTER_SECONDS)
        if self._turns.is_full:
            message = "unable to send; this node holds as much of running turns as GATEWAY_MAX_BUFFER allows"
            raise Refusal(ErrorCode.RATE_LIMITED, message, retry_after_seconds=RETRY_AFTER_SECONDS)

    async def send(self, request: SendRequest, accepted: Callable[[Accepted], None]) -> Accepted:
        """Ask for a turn; to be run to its end, also when its client is gone.

        Args:
            request: What for.
            accepted: Called as soon as the turn is journalled, before anybody is shown a record of it.

        Raises:
            Refusal: Nothing was sent to the backend by this call.
        """
        key = request.session, request.turn
        while key in self._beginning:  # the same send, a moment ago
            await self._beginning[key].wait()
        self._beginning[key] = asyncio.Event()
        try:
            return await self._send(request, accepted)
        finally:
            self._beginning.pop(key).set()

    async def _send(self, request: SendRequest, accepted: Callable[[Accepted], None]) -> Accepted:
        start = Draft(RecordKind.TURN_START, self._start_members(request))
        result = self._known(request)
        if result is None:
            result = await self._begin(request, start)
        key = request.session, request.turn
        if not isinstance(result, Begun) and self._turns.get(*key) is None and key not in self._unsure:
            self._lease.release(request.session, request.turn)
        outcome: Accepted
        match result:
            case Begun():
                producer = self._turns.start(self._assignment(request, result, start))
                outcome = _accepted(request, result.start, opening=producer.opening)
                accepted(outcome)
                self._hub.publish(request.session, (Record(result.start, request.turn, start),))
                for other in result.waits_for:
                    self._turns.cancel(request.session, other, request.by)
            case BegunCancelled(cursor):
                outcome = _accepted(request, cursor)
                accepted(outcome)
                self._hub.publish(request.session, ())
            case Duplicate(cursor):
                running = self._turns.get(request.session, request.turn)
                opening = None if running is None else running.opening
                outcome = _accepted(request, cursor, duplicate=True, opening=opening)
                accepted(outcome)
            case Conflict() | Busy() | Rewound():
                raise _refused(result)
        return outcome

    def _known(self, request: SendRequest) -> BeginResult | None:
        """What is known here of a turn that this node produces, or did a moment ago.

        The journal may have lost it since, in a failover, and would begin it once more (G3).
        """
        producer = self._turns.known(request.session, request.turn)
        if producer is None:
            return None
        if producer.assignment.beginning.digest != _digest(request):
            return Conflict()
        producer.verify()
        return Duplicate(producer.start, "")

    async def _begin(self, request: SendRequest, start: Draft) -> BeginResult:
        key = request.session, request.turn
        unsure = self._unsure.get(key)
        if unsure is not None:
            unsure.is_wanted = True
        elif len(self._unsure) >= MAX_UNSURE:
            message = "unable to send; the store has not answered many before this one"
            raise Refusal(ErrorCode.STORE_UNAVAILABLE, message, retry_after_seconds=RETRY_AFTER_SECONDS)
        token = secrets.token_hex(8) if unsure is None else unsure.token  # then it is the very same call
        try:
            await self._lease.claim(request.session, request.turn)
            result = await self._ask_to_begin(request, start, token)
        except StoreError as error:
            self._lease.abandon(request.session, request.turn)
            raise store_refusal(error) from error
        except StoreUnavailable as error:
            if unsure is None:
                self._unsure[key] = unsure = _Unsure(token)
                self._turns.spawn(self._undo(*key, unsure), f"undo-{request.turn}")
            raise store_refusal(error) from error
        else:
            if isinstance(result, Begun):
                self._unsure.pop(key, None)
            return result
        finally:
            if unsure is not None:
                unsure.is_wanted = False

    async def _ask_to_begin(self, request: SendRequest, start: Draft, token: str) -> BeginResult:
        new_epoch = secrets.token_hex(8)

        async def begin() -> BeginResult:
            return await self._journal.begin(
                request.session,
                request.turn,
                token=token,
                new_epoch=new_epoch,
                digest=_digest(request),
                overlap=request.overlap,
                path=request.chat_path,
                by=request.by,
                start=start,
                cancelled=wire.turn_end(End(EndReason.CANCELLED, by=request.by)),
            )

        try:
            result = await begin()
        except StoreUnavailable:
            result = await begin()  # it may have begun and only its reply be lost
        if isinstance(result, Rewound):
            self._repairs.suspect(request.session)
            await self._repairs.settled(request.session)
            result = await begin()
        return result

    async def _undo(self, session: SessionId, turn: TurnId, unsure: _Unsure) -> None:
        """End what a send may have begun that was refused because nobody knew (G7)."""
        error = TurnError(EndCode.STORE_LOST, "the store was away when this was sent; send again")
        end = wire.turn_end(End(EndReason.INTERRUPTED, error=error))
        key = session, turn
        while self._unsure.get(key) is unsure:
            # A seal that waits for a frozen store would come before what is sent again at the thaw.
            if not await self._is_answered(session, turn):
                await asyncio.sleep(UNDO_RETRY_SECONDS)
                continue
            await asyncio.sleep(UNDO_GRACE_SECONDS)
            if unsure.is_wanted or self._unsure.get(key) is not unsure:
                continue
            try:
                result = await self._journal.seal(
                    session,
                    turn,
                    node=self._lease.node,
                    reason=EndReason.INTERRUPTED,
                    end=end,
                    token=unsure.token,
                )
            except StoreUnavailable:
                await asyncio.sleep(UNDO_RETRY_SECONDS)
                continue
            except StoreError:
                if self._unsure.get(key) is unsure:
                    del self._unsure[key]
                    self._lease.abandon(session, turn)
                raise
            self._hub.publish(session, ())
            if isinstance(result, Rewound):
                self._repairs.suspect(session)
            elif self._unsure.get(key) is unsure and not unsure.is_wanted:
                del self._unsure[key]
                self._lease.release(session, turn)
                return
            await asyncio.sleep(UNDO_RETRY_SECONDS)

    async def _is_answered(self, session: SessionId, turn: TurnId) -> bool:
        """Whether the store is there again; nothing is changed by a question that it reads later."""
        try:
            await self._journal.turn(session, turn)
        except StoreUnavailable:
            return False
        except StoreError:
            pass  # the seal meets it as well, and it is told of there
        return True

    def _start_members(self, request: SendRequest) -> bytes:
        return turn_start(
            request.body,
            path=request.chat_path,
            by=request.by,
            at_milliseconds=time.time_ns() // 1_000_000,
            max_bytes=self._config.max_event_bytes,
        )

    def _assignment(self, request: SendRequest, begun: Begun, start: Draft) -> Assignment:
        def gate() -> Coroutine[object, object, bool] | None:
            return self._wait_for_turn(request, begun) if begun.waits_for else None

        return Assignment(
            session=request.session,
            turn=request.turn,
            fence=begun.fence,
            beginning=Beginning(
                begun.start, start, digest=_digest(request), path=request.chat_path, user=request.by.user
            ),
            answer_id=request.body.answer_id(request.turn),
            call=self._upstream.call(request.path, body=request.body.raw, headers=request.headers),
            gate=gate,
            released=request.released,
        )

    async def _wait_for_turn(self, request: SendRequest, begun: Begun) -> bool:
        """An interrupting send goes to the backend when those it cancelled have let go of it."""
        waits = (self._wait_for_end(request.session, turn) for turn in begun.waits_for)
        await asyncio.gather(*waits)
        give_up_at = time.monotonic() + self._config.outage_seconds
        while True:
            try:
                return await self._journal.start(request.session, request.turn, begun.fence)
            except StoreUnavailable:
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(START_RETRY_SECONDS)

    async def _wait_for_end(self, session: SessionId, turn: TurnId) -> None:
        """For as long as an interrupting send waits at the most; the journal knows the rest."""
        producer = self._turns.get(session, turn)
        if producer is not None:
            await asyncio.wait({producer.ended}, timeout=LET_GO_SECONDS)
            return
        with contextlib.suppress(StoreUnavailable, StoreError):
            await self._endings.wait(session, turn, seconds=LET_GO_SECONDS)


def _accepted(
    request: SendRequest,
    start: Cursor,
    *,
    duplicate: bool = False,
    opening: asyncio.Future[Opening] | None = None,
) -> Accepted:
    before = Cursor(start.epoch, start.offset - 1)
    return Accepted(request.session, request.turn, before, duplicate=duplicate, opening=opening)


def _refused(result: Conflict | Busy | Rewound) -> Refusal:
    match result:
        case Conflict():
            message = "unable to send; this turn id was used with another body, mint a new one"
            return Refusal(ErrorCode.CONFLICT, message)
        case Busy():
            message = "unable to send; a turn of this session is running"
            return Refusal(ErrorCode.BUSY, message, retry_after_seconds=RETRY_AFTER_SECONDS)
        case Rewound():
            message = "unable to send yet; the store has lost records, and they are being written again"
            return Refusal(ErrorCode.STORE_UNAVAILABLE, message, retry_after_seconds=RETRY_AFTER_SECONDS)


def _digest(request: SendRequest) -> str:
    return hashlib.sha256(request.path.encode() + b"\0" + request.body.raw).hexdigest()


def store_refusal(error: StoreUnavailable | StoreError) -> Refusal:
    """What a client is told when the store is away."""
    return Refusal(ErrorCode.STORE_UNAVAILABLE, str(error), retry_after_seconds=RETRY_AFTER_SECONDS)
