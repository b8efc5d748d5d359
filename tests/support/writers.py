"""Writers: nodes of which nothing runs but the writers of their turns, on a real store that can lose records.

::

    async with writers_on(url) as rig:
        turn = await rig.node("n1").begin("t1")
        turn.say(3)
        await turn.journalled()
        before = rig.snapshot()
        ...
        before.restore()      # the failover
        turn.writer.verify()  # as the beat of the node does
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import redis

from gateway import journal as journal_module
from gateway.answer import Assignment, Beginning
from gateway.core.model import By, Draft, EndReason, NodeId, Overlap, RecordKind, SessionId, TurnId
from gateway.core.turn import End
from gateway.core.wire import turn_end
from gateway.journal import SessionJournal
from gateway.keys import session_keys
from gateway.outcomes import Begun, Rewound
from gateway.repairs import Repairs
from gateway.store import Store, StoreUnavailable
from gateway.turnwriter import NotOurs, TurnWriter
from tests.support.snapshot import Snapshot, take_snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from gateway.core.model import Record
    from gateway.outcomes import AppendResult, RepairResult

SESSION = SessionId("chat-1")
Answer = TypeVar("Answer", bound="AppendResult | RepairResult")
WAIT_SECONDS = 20.0
REPAIR_SECONDS = 0.2
"""What a node gives the others to write back what they hold."""


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds that sets no event."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not await holds():  # noqa: ASYNC110 - what another node does sets no event here
            await asyncio.sleep(0.005)


class WatchedJournal(SessionJournal):
    """The journal of one node, which remembers what it answered.

    Attributes:
        answers: Each verb of a writer and its answer, in order.
        lose: How many answers of writers are still to be lost: their calls are carried out.
        lose_repairs: The same, of repairs alone.
        meanwhile: What happens after a repair whose answer is lost.
    """

    def __init__(self, store: Store, node: str, prefix: str, witness: Witness) -> None:
        super().__init__(store, node=NodeId(node), prefix=prefix, ttl_seconds=60, window_seconds=60)
        self.answers: list[tuple[str, AppendResult | RepairResult]] = []
        self.lose = self.lose_repairs = 0
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        self._witness = witness

    async def append(self, *arguments: Any, **named: Any) -> AppendResult:
        verb = "append" if named["drafts"] else "ask"
        return await self._answered(verb, super().append(*arguments, **named))

    async def end(self, *arguments: Any, **named: Any) -> AppendResult:
        return await self._answered("end", super().end(*arguments, **named))

    async def repair(self, *arguments: Any, **named: Any) -> RepairResult:
        return await self._answered("repair", super().repair(*arguments, **named))

    async def see(self) -> None:
        """A reader of this node reads all that the journal has."""
        page = await self.read(SESSION, after=0, limit_bytes=10**9)
        self._witness.saw(page.records)

    async def _answered(self, verb: str, call: Coroutine[Any, Any, Answer]) -> Answer:
        answer = await call
        if self.lose or (self.lose_repairs and verb == "repair"):
            if self.meanwhile is not None:
                await self.meanwhile()
            self.lose, self.lose_repairs = max(0, self.lose - 1), max(0, self.lose_repairs - 1)
            raise StoreUnavailable("unable to use the store; the reply was lost")
        self.answers.append((verb, answer))
        return answer


@dataclass
class Witness:
    """Everything that anybody was ever shown: one text of a cursor has one content."""

    contents: dict[str, tuple[TurnId, Draft]] = field(default_factory=dict)

    def saw(self, records: Sequence[Record]) -> None:
        for record in records:
            text, content = str(record.cursor), (record.turn, record.draft)
            assert record.cursor.check, text
            assert self.contents.setdefault(text, content) == content, text


class WrittenTurn:
    """A turn and its writer, from its begin to the end of its hold."""

    def __init__(self, node: WriterNode, name: TurnId, begun: Begun, start: Draft) -> None:
        self.node, self.name, self.start = node, name, start
        self.drafts: list[Draft] = []
        self.closing: list[Draft] = []
        self.cancelled = 0
        self.away: list[float] = []
        self.released = asyncio.Event()
        self.reason: EndReason | None = None
        self.given_up = ""
        beginning = Beginning(begun.start, start, "d", "/api/chat", "")
        self.assignment = Assignment(
            SESSION, name, begun.fence, beginning, "", cast("Any", None), lambda: None, None
        )
        self.writer = TurnWriter(
            self.assignment,
            journal=node.journal,
            publish=node.publish,
            suspect=node.suspect,
            cancelled=self._cancel,
            away=self.away.append,
        )
        self.task = asyncio.create_task(self._run(), name=f"turn-{name}")

    def say(self, count: int, size: int = 0) -> None:
        """The backend wrote."""
        first = len(self.drafts)
        drafts = [
            Draft(RecordKind.CHUNK, f"{self.name}:{number}".encode() + b"." * size)
            for number in range(first, first + count)
        ]
        self.drafts += drafts
        self.writer.add(drafts)

    def finish(self, *, closers: int = 0) -> None:
        """The backend is done."""
        closing = tuple(Draft(RecordKind.CHUNK, f"{self.name}:closer{n}".encode()) for n in range(closers))
        end = End(EndReason.COMPLETE, closing)
        self.closing = [*closing, turn_end(end)]
        self.writer.finish(end)

    @property
    def whole(self) -> list[Draft]:
        """What the journal has to hold of it."""
        return [self.start, *self.drafts, *self.closing]

    async def journalled(self) -> None:
        """Wait until the journal has all of it."""
        await eventually(self.is_journalled)

    async def is_journalled(self) -> bool:
        records = await self.node.rig.records()
        return [record.draft for record in records if record.turn == self.name] == self.whole

    async def _run(self) -> None:
        try:
            self.reason = await self.writer.write()
            await self.writer.hold(self.released)
        except NotOurs as error:
            self.given_up = error.why

    def _cancel(self, _: By) -> None:
        self.cancelled += 1


class WriterNode:
    """One node: a journal as it has seen it, its writers, and its repairs."""

    def __init__(self, rig: Writers, name: str, store: Store) -> None:
        self.rig, self.name = rig, name
        self.journal = WatchedJournal(store, name, rig.prefix, rig.witness)
        self.repairs = Repairs(self.journal, wait_seconds=REPAIR_SECONDS)
        self.repairs.verify = lambda _: self.verify()
        self.turns: list[WrittenTurn] = []
        self.published: list[Record] = []
        self.suspected = 0

    def publish(self, session: SessionId, records: Sequence[Record]) -> None:
        assert session == SESSION
        self.published += records
        self.rig.witness.saw(records)

    def suspect(self, session: SessionId) -> None:
        self.suspected += 1
        self.repairs.suspect(session)

    def verify(self) -> None:
        for turn in self.turns:
            turn.writer.verify()

    async def begin(self, name: str) -> WrittenTurn:
        """Begin a turn, as a send does: a journal that has lost something has to be settled first."""
        start = Draft(RecordKind.TURN_START, f"start {name}".encode())
        while True:
            begun = await self.journal.begin(
                SESSION, TurnId(name), token=secrets.token_hex(4), new_epoch=secrets.token_hex(8), digest="d",
                overlap=Overlap.PARALLEL, path="/api/chat", by=By(), start=start,
                cancelled=Draft(RecordKind.TURN_END, b""),
            )  # fmt: skip
            if not isinstance(begun, Rewound):
                break
            self.suspect(SESSION)
            await self.repairs.settled(SESSION)
        assert isinstance(begun, Begun)
        turn = WrittenTurn(self, TurnId(name), begun, start)
        self.turns.append(turn)
        return turn


class Writers:
    """The nodes, and the store below them."""

    def __init__(self, store: Store, admin: redis.Redis) -> None:
        self.store, self.admin = store, admin
        self.prefix = f"t{secrets.token_hex(4)}"
        self.keys = session_keys(self.prefix, SESSION)
        self.witness = Witness()
        self.nodes: dict[str, WriterNode] = {}

    def stranger(self) -> WatchedJournal:
        """The journal of who has seen nothing before, and so is told whatever there is."""
        return WatchedJournal(self.store, "stranger", self.prefix, self.witness)

    def node(self, name: str, store: Store | None = None) -> WriterNode:
        if name not in self.nodes:
            self.nodes[name] = WriterNode(self, name, store or self.store)
        return self.nodes[name]

    @property
    def turns(self) -> list[WrittenTurn]:
        return [turn for node in self.nodes.values() for turn in node.turns]

    def snapshot(self) -> Snapshot:
        return take_snapshot(self.admin, self.keys.prefix)

    async def records(self) -> list[Record]:
        """What the journal holds now."""
        page = await self.stranger().read(SESSION, after=0, limit_bytes=10**9)
        self.witness.saw(page.records)
        return list(page.records)

    async def epoch(self) -> str:
        return (await self.stranger().look(SESSION)).epoch

    async def settled(self, *, is_running: bool = False) -> None:
        """Beat after beat of every node, until each turn is in the journal whole; and then it stays so.

        Args:
            is_running: Some turns have not ended yet.
        """
        assert is_running or all(turn.closing for turn in self.turns)

        async def are_whole() -> bool:
            for node in self.nodes.values():
                node.verify()
            assert not [turn for turn in self.turns if turn.task.done() and turn.task.exception() is not None]
            return await self._is_whole()

        await eventually(are_whole)
        asked = [len(node.journal.answers) for node in self.nodes.values()]
        for node in self.nodes.values():
            node.verify()

        async def have_asked() -> bool:
            return all(
                len(node.journal.answers) >= before + len(node.turns)
                for node, before in zip(self.nodes.values(), asked, strict=True)
            )

        await eventually(have_asked)
        assert await self._is_whole()

    async def _is_whole(self) -> bool:
        records = await self.records()
        held = [
            [record.draft for record in records if record.turn == turn.name] == turn.whole
            for turn in self.turns
        ]
        return all(held) and len(records) == sum(len(turn.whole) for turn in self.turns)

    async def close(self) -> None:
        for turn in self.turns:
            turn.released.set()
            turn.task.cancel()
        for node in self.nodes.values():
            await node.repairs.close()
        for turn in self.turns:
            with suppress(asyncio.CancelledError):
                await turn.task


@asynccontextmanager
async def writers_on(url: str) -> AsyncIterator[Writers]:
    """Nodes on a store; nothing of them is left."""
    with redis.Redis.from_url(url) as admin:
        async with Store(url, journal_module.SCRIPTS) as store:
            rig = Writers(store, admin)
            try:
                yield rig
            finally:
                await rig.close()
