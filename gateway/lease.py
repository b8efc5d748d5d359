"""Who produces a turn, and who is gone.

A node gives signs of life. Who has given none for a lease is gone (the rules: :mod:`gateway.core.silence`),
and its turns may be ended by any other (sealed). A node that wakes after that beats again as if nothing were:
the journal refuses whatever it still has to say of those turns.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from gateway.core.model import NodeId, SessionId, TurnId
from gateway.core.silence import Silence
from gateway.journal import milliseconds
from gateway.store import Store, StoreError, StoreUnavailable, load_script

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    Seal = Callable[[SessionId, TurnId, NodeId], Awaitable[object]]

log = structlog.get_logger(__name__)

_BEAT = load_script("beat")
_CLAIM = load_script("claim")
_ORPHANS = load_script("orphans")
_FORGET = load_script("forget")

SCRIPTS = (_BEAT, _CLAIM, _ORPHANS, _FORGET)

BEATS_PER_LEASE = 3
"""Two may be lost."""

MAX_BEAT_SECONDS = 1.5
"""A node is found gone up to two beats after its lease: one until its last beat was heard of, one more when
the lease is over. G7 grants 5 s for that and for ending its turns."""

SEALS_AT_ONCE = 32
"""Some 1,000 turns take a second where the store is 1 ms away from a busy node; appends go on beside them."""

CLAIMS_SECONDS = 86_400.0
"""How long a node's claims outlive its last beat, if no node is there to end its turns for so long."""

STOP_SECONDS = 3.0
"""How long what runs may take to end when it is told to; a call of the store has a deadline below that."""

_KEPT = milliseconds(CLAIMS_SECONDS)


class Lease:
    """A node's place among the nodes.

    Args:
        store: Open.
        node: This one; a new name at every start.
        prefix: Starts every key.
        lease_seconds: Silence after which a node is gone.

    Attributes:
        leaving: Set when this node stops and takes no more sends; the others see it at the next beat.
    """

    def __init__(self, store: Store, *, node: NodeId, prefix: str, lease_seconds: float) -> None:
        self.node = node
        self.leaving = False
        self._store = store
        self._nodes = f"{prefix}:{{nodes}}"
        self._lease_seconds = lease_seconds
        self._silence = Silence(lease_seconds)
        self._contact = store.contact
        self._claimed: set[str] = set()
        """What this node produces, or is about to."""
        self._abandoned: set[str] = set()
        """What it has claimed, does not produce any more, and has not seen ended."""
        self._strays: set[str] = set()
        """Own claims that were found, at the last beat, to be of turns that it does not produce."""
        self._ending: asyncio.Task[None] | None = None

    async def run(self, seal: Seal, beat: Callable[[], None] = lambda: None) -> None:
        """Beat, and have the turns of silent nodes ended. Its owner cancels it.

        Args:
            seal: Ends one turn of a node, if it has not ended. Raises :class:`StoreUnavailable` when it
                cannot yet: it is asked again at a later beat.
            beat: Called at every beat that the store has answered.
        """
        try:
            while True:
                next_beat = time.monotonic() + min(self._lease_seconds / BEATS_PER_LEASE, MAX_BEAT_SECONDS)
                try:
                    await self._observe()
                    beat()
                    strays = await self._find_strays()
                except StoreUnavailable:
                    self._silence.lost()
                except StoreError:
                    log.exception("lease.failed")
                else:
                    self._end_turns_soon(seal, strays)
                await asyncio.sleep(max(0.0, next_beat - time.monotonic()))
        finally:
            await self._stop_ending()

    @property
    def may_seal(self) -> bool:
        """Whether this node has been in contact with the store for long enough to judge another."""
        return self._silence.may_judge and self._contact == self._store.contact

    @property
    def others_live(self) -> bool:
        """Whether another node, as far as is known, lives and is to stay: clients can go there.

        A hint: a node that was never seen to change counts by the age of its score beside one's own, which
        the same server has written.
        """
        scores = self._silence.scores
        own = abs(scores.get(self.node, 0.0))
        return any(
            score > 0 and own - score < milliseconds(self._lease_seconds) and not self._silence.is_gone(node)
            for node, score in scores.items()
            if node != self.node
        )

    async def is_gone(self, node: NodeId) -> bool:
        """Whether a node's turns may be ended by this one.

        Raises:
            StoreUnavailable: The node is in no observation yet, and none can be made.
        """
        if node == self.node or not self.may_seal:
            return False
        if node not in self._silence.scores:
            await self._observe()
        return self._is_gone(node)

    def claim(self, session: SessionId, turn: TurnId) -> asyncio.Future[None]:
        """Say that this node is about to produce a turn; before ``begin``, so that no turn is forgotten.

        Returns:
            To be awaited before ``begin``. It is done at once where the store keeps the order of the two;
            else it may fail with :class:`StoreUnavailable`, and the turn is not claimed then.
        """
        member = _member(session, turn)
        self._claimed.add(member)
        if self._store.is_sharded:
            told = self._change(self.node, member, "add")
            told.add_done_callback(lambda done: self._claim_told(member, done))
            return told
        self._tell(self.node, member, "add")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def release(self, session: SessionId, turn: TurnId) -> None:
        """The turn has ended, or was never begun."""
        member = _member(session, turn)
        self._claimed.discard(member)
        self._tell(self.node, member, "remove")

    def abandon(self, session: SessionId, turn: TurnId) -> None:
        """This node does not produce the turn any more; it is sealed soon, if it has not ended."""
        member = _member(session, turn)
        self._claimed.discard(member)
        self._abandoned.add(member)

    def has_claimed(self, session: SessionId, turn: TurnId) -> bool:
        """Whether this node produces the turn, or is about to."""
        return _member(session, turn) in self._claimed

    async def leave(self) -> None:
        """Say goodbye, if all of this node's turns have ended; else it is found silent, and they are."""
        if self._abandoned or self._claimed:
            return
        await self._store.writes.call(_FORGET, (self._nodes, self._turns_of(self.node)), (self.node, ""))

    async def check(self) -> None:
        """Ask the store for a sign of life.

        Raises:
            StoreUnavailable: It gives none.
        """
        await self._observe()

    def _is_gone(self, node: NodeId) -> bool:
        return self.may_seal and self._silence.is_gone(node)

    async def _observe(self) -> None:
        """Beat, and hear who else does."""
        asked_at = time.monotonic()
        added, told = await self._store.writes.call(
            _BEAT,
            (self._nodes, self._turns_of(self.node)),
            (self.node, _KEPT, "leaving" if self.leaving else ""),
        )
        fields = iter(told)
        scores = {NodeId(node.decode()): float(score) for node, score in zip(fields, fields, strict=True)}
        # A node that is not known any more was taken for gone; or the list was lost, with others on it.
        anew = bool(added) or self._contact != self._store.contact
        self._contact = self._store.contact
        self._silence.heard(scores, asked_at=asked_at, answered_at=time.monotonic(), anew=anew)

    async def _find_strays(self) -> set[str]:
        """Own claims without a producer, at two beats in a row: a release may be on its way."""
        stored = await self._claims_of(self.node)
        for member in (self._claimed | self._abandoned) - stored:  # evicted, or lost by a failover
            self._tell(self.node, member, "add")
        before, self._strays = self._strays, stored - self._claimed
        return before & self._strays

    # -- ending the turns of others

    def _end_turns_soon(self, seal: Seal, strays: set[str]) -> None:
        """Beside the beats: who ends the turns of others must not fall silent itself."""
        silent = self._silence.silent() if self.may_seal else {}
        if (strays or silent) and (self._ending is None or self._ending.done()):
            self._ending = asyncio.create_task(self._end_turns(seal, strays, silent), name="lease-seal")

    async def _end_turns(self, seal: Seal, strays: set[str], silent: dict[NodeId, float]) -> None:
        try:
            await self._seal_all(self.node, strays, seal)
            for node, score in silent.items():
                await self._seal_all(node, await self._claims_of(node), seal)
                await self._store.writes.call(
                    _FORGET, (self._nodes, self._turns_of(node)), (node, f"{score:.0f}")
                )
        except StoreUnavailable as error:
            log.info("lease.sealing-put-off", error=str(error))
        except StoreError:
            log.exception("lease.failed")

    async def _seal_all(self, node: NodeId, members: Collection[str], seal: Seal) -> None:
        """As many at a time as are allowed, as long as the node does not beat again."""
        waiting = sorted(members)
        while waiting and (node == self.node or self._is_gone(node)):
            await asyncio.gather(*(self._seal(node, member, seal) for member in waiting[:SEALS_AT_ONCE]))
            del waiting[:SEALS_AT_ONCE]

    async def _seal(self, node: NodeId, member: str, seal: Seal) -> None:
        turn, _, session = member.partition(" ")
        try:
            await seal(SessionId(session), TurnId(turn), node)
        except StoreUnavailable as error:
            # The claim stays, and so does the node: both are met again at the next beat.
            log.info("turn.seal-put-off", session=session, turn=turn, node=node, error=str(error))
            return
        except StoreError:
            # One session's broken key must not keep the others from their end.
            log.exception("turn.seal-failed", session=session, turn=turn, node=node)
        self._abandoned.discard(member)
        self._tell(node, member, "remove")

    async def _stop_ending(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.wait({self._ending}, timeout=STOP_SECONDS)

    # -- the store

    async def _claims_of(self, node: NodeId) -> set[str]:
        # By the lane that claims: behind what was told of them.
        found = await self._store.writes.call(_ORPHANS, (self._turns_of(node),), ())
        return {member.decode() for member in found}

    def _change(self, node: NodeId, member: str, change: str) -> asyncio.Future[None]:
        return self._store.writes.call(_CLAIM, (self._turns_of(node),), (member, change, _KEPT))

    def _tell(self, node: NodeId, member: str, change: str) -> None:
        self._store.writes.tell(_CLAIM, (self._turns_of(node),), (member, change, _KEPT))

    def _claim_told(self, member: str, told: asyncio.Future[None]) -> None:
        if not told.cancelled() and told.exception() is not None:
            self._claimed.discard(member)

    def _turns_of(self, node: NodeId) -> str:
        return f"{self._nodes}:{node}"


def _member(session: SessionId, turn: TurnId) -> str:
    """Of a node's claims; a turn id has no space in it."""
    return f"{turn} {session}"
