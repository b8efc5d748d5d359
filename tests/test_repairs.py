"""Who notices a loss that is not its own waits for those who hold what is lost, then tells everybody."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from gateway import repairs as repairs_module
from gateway.core.model import Cursor
from gateway.journal import SCRIPTS
from gateway.repairs import Repairs
from gateway.store import Store
from tests.support.valkey import running_valkey
from tests.support.writers import SESSION, Writers, eventually, writers_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from tests.support.writers import WriterNode, WrittenTurn

LONG_SECONDS = 60.0
"""What no test waits for."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One server; each test has its own keys."""
    with running_valkey() as url:
        yield url


@pytest.fixture
async def rig(url: str) -> AsyncIterator[Writers]:
    async with writers_on(url) as rig:
        yield rig


def patient(node: WriterNode, seconds: float = LONG_SECONDS) -> Repairs:
    """The node's repairs, that wait for others as long as it takes."""
    repairs = Repairs(node.journal, wait_seconds=seconds)
    repairs.verify = node.repairs.verify
    node.repairs = repairs
    return repairs


async def lose(rig: Writers, reader: WriterNode, owner: WriterNode) -> WrittenTurn:
    """A reader has seen what the turn of another node then loses."""
    turn = await owner.begin("t1")
    snapshot = rig.snapshot()
    turn.say(2)
    await turn.journalled()
    await reader.journal.see()
    snapshot.restore()
    return turn


def repairing(node: WriterNode) -> list[asyncio.Task[None]]:
    return list(node.repairs._tasks.values())


async def test_what_nobody_writes_back_is_given_up(rig: Writers) -> None:
    """The journal gets a new epoch, and every client is told; a session is not stuck for ever."""
    reader, owner = rig.node("n1"), rig.node("n2")
    turn = await lose(rig, reader, owner)
    epoch = await rig.epoch()
    reader.repairs.suspect(SESSION)
    await reader.repairs.settled(SESSION)
    assert await rig.epoch() != epoch
    assert [record.turn for record in await rig.records()] == [turn.name]
    assert not (await reader.journal.look(SESSION)).rewound
    await eventually(_nothing_runs(reader))


def _nothing_runs(node: WriterNode) -> Callable[[], Awaitable[bool]]:
    async def runs_nothing() -> bool:
        return not repairing(node)

    return runs_nothing


@pytest.mark.parametrize("whose", ["n1", "n2"])
async def test_what_is_written_back_is_not_given_up(rig: Writers, whose: str) -> None:
    """This node's own producers are asked; others find it with their beat."""
    reader = rig.node("n1")
    patient(reader)
    turn = await lose(rig, reader, rig.node(whose))
    epoch = await rig.epoch()
    reader.repairs.suspect(SESSION)
    reader.repairs.suspect(SESSION)
    [repair] = repairing(reader)
    if whose == "n2":
        turn.writer.verify()
    await reader.repairs.settled(SESSION)
    assert repair.done()
    assert await rig.epoch() == epoch
    await turn.journalled()


async def test_a_session_that_is_well_is_left_alone(rig: Writers) -> None:
    """A suspicion may be late: whoever had something to write back has done so, or another has renewed."""
    node = rig.node("n1")
    repairs = patient(node)
    repairs.suspect(SESSION)  # of which nothing was ever seen
    await repairs.settled(SESSION)
    turn = await node.begin("t1")
    epoch = await rig.epoch()
    repairs.suspect(SESSION)
    await repairs.settled(SESSION)
    assert await rig.epoch() == epoch
    rig.admin.delete(rig.keys.meta)
    repairs.suspect(SESSION)
    await repairs.settled(SESSION)
    turn.finish()
    await rig.settled()


@asynccontextmanager
async def store_of_its_own(rig: Writers, url: str) -> AsyncIterator[tuple[Store, str]]:
    """A store under a user whose rights can be taken away: then it is away."""
    user = f"u{secrets.token_hex(4)}"
    rig.admin.acl_setuser(user, enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all"])
    async with Store(url.replace("unix://", f"unix://{user}:x@"), SCRIPTS) as store:
        yield store, user


async def test_while_the_store_is_away_nothing_is_given_up(
    rig: Writers, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can write back what they hold meanwhile; their time begins anew."""
    monkeypatch.setattr(repairs_module, "RETRY_SECONDS", 0.05)
    async with store_of_its_own(rig, url) as (store, user):
        reader = rig.node("n1", store)
        patient(reader, 2.0)
        turn = await lose(rig, reader, rig.node("n2"))
        epoch = await rig.epoch()
        rig.admin.acl_setuser(
            user, enabled=True, nopass=True, keys=["*"], commands=["-@all", "+auth", "+hello"]
        )
        reader.repairs.suspect(SESSION)
        [repair] = repairing(reader)
        await asyncio.wait({repair}, timeout=2.5)  # more than it gives to others
        assert not repair.done()
        rig.admin.acl_setuser(user, enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all"])
        await asyncio.wait({repair}, timeout=0.4)
        turn.writer.verify()
        await asyncio.wait({repair}, timeout=LONG_SECONDS)
        assert await rig.epoch() == epoch
        assert repair.done()
        await rig.close()


async def test_a_place_that_a_client_had_is_waited_for(rig: Writers) -> None:
    """This node has never seen it; who holds it writes it back, and then the client goes on."""
    reader, owner = rig.node("n1"), rig.node("n2")
    repairs = patient(reader)
    turn = await owner.begin("t1")
    snapshot = rig.snapshot()
    turn.say(2)
    await turn.journalled()
    had = (await rig.records())[-1].cursor
    snapshot.restore()
    waiting = asyncio.create_task(repairs.settled(SESSION, until=had))
    await asyncio.wait({waiting}, timeout=3 * repairs_module.LOOK_SECONDS)
    assert not waiting.done()
    turn.writer.verify()
    await asyncio.wait({waiting}, timeout=LONG_SECONDS / 2)
    assert waiting.done()
    await repairs.settled(SESSION, until=had)
    async with asyncio.timeout(20):
        await repairs.settled(SESSION, until=Cursor("ab", 99))  # of another epoch: nobody brings it back


async def test_a_place_that_does_not_come_back_is_not_waited_for_for_ever(rig: Writers) -> None:
    """A client may say anything; nothing is renewed for its word."""
    node = rig.node("n1")
    turn = await node.begin("t1")
    epoch = await rig.epoch()
    async with asyncio.timeout(20):
        await node.repairs.settled(SESSION, until=Cursor(epoch, 999))
    assert await rig.epoch() == epoch
    assert not repairing(node)
    turn.finish()
    await rig.settled()


async def test_a_node_that_stops_leaves_no_repair_behind(rig: Writers) -> None:
    """Every task has an end."""
    reader = rig.node("n1")
    repairs = patient(reader)
    await lose(rig, reader, rig.node("n2"))
    await repairs.close()
    repairs.suspect(SESSION)
    [repair] = repairing(reader)
    await repairs.close()
    assert repair.cancelled()
    assert not repairing(reader)
