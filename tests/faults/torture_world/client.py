"""One client: it visits, does what its plan says, goes, and comes back elsewhere by another carrier."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.faults.torture_world import plans
from tests.faults.torture_world.carriers import BROKEN, Carried
from tests.faults.torture_world.http_carriers import EventStream, Polls
from tests.faults.torture_world.recorder import Recorder, Running
from tests.faults.torture_world.socket_carrier import Socket
from tests.support.client import send_body

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tests.faults.torture_world.backend import TortureBackend
    from tests.faults.torture_world.fleet import Fleet
    from tests.faults.torture_world.history import History
    from tests.faults.torture_world.plans import Act, Scale, Visit

CARRIERS: dict[str, type[Carried]] = {"websocket": Socket, "sse": EventStream, "long-poll": Polls}

BACK_OFF_SECONDS = 0.3
REMEMBERED_TURNS = 8
EARLY_SECONDS = 0.3


@dataclass(slots=True)
class World:
    """What all clients share.

    Attributes:
        calm: Set when faults and visits are over: each client comes back once more, and stays.
        over: Set when all are to go.
        figures: Counted by whoever did it.
    """

    seed: int
    scale: Scale
    history: History
    backend: TortureBackend
    fleet: Fleet
    running: Running = field(default_factory=Running)
    calm: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    figures: Counter[str] = field(default_factory=Counter)


def session_name(seed: int, number: int) -> str:
    """Sessions of one run; others have others."""
    return f"s{seed}-{number}"


class TortureClient:
    """One client.

    Args:
        number: Which.
        world: Where.
    """

    def __init__(self, number: int, world: World) -> None:
        self._number = number
        self._world = world
        self._recorder = Recorder(f"c{number:02}", world.history, world.backend, world.running)
        self._connections = 0
        self._last_place: tuple[int, str] | None = None
        self._sent: list[tuple[str, dict[str, Any]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Visit until all is calm; then come back once more and stay to the end."""
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(limit=0, force_close=True)
        ) as http:
            visits = plans.visits(self._world.seed, self._number, self._world.scale)
            number, visit = 0, next(visits)
            while not self._world.calm.is_set():
                await self._visit(http, visit, f"{self._recorder.name}-{number}")
                number, visit = number + 1, next(visits)
            while not self._world.over.is_set():
                await self._stay(http, visit)
            await asyncio.gather(*self._tasks)

    async def _visit(self, http: aiohttp.ClientSession, visit: Visit, name: str) -> None:
        carried = self._connect(http, visit)
        try:
            await carried.open(self._where(visit))
            self._note_move(visit)
            for index, act in enumerate(visit.acts):
                if not await self._idle(act.pause_seconds, carried, visit):
                    break
                self._spawn(self._do(carried, act, f"{name}-{index}"), f"{name}-{index}")
            if visit.leave == "detach" and isinstance(carried, Socket):
                await carried.ask({"type": "detach", "session": carried.session})
        except BROKEN:
            self._world.figures["visits that found no node"] += 1
            await asyncio.sleep(BACK_OFF_SECONDS)
        finally:
            await carried.close(drop=visit.leave == "drop")

    async def _stay(self, http: aiohttp.ClientSession, visit: Visit) -> None:
        """Read on where it stopped, without a word, until the end of the world."""
        carried = self._connect(http, visit)
        try:
            session = self._session(visit.session)
            await carried.open(self._recorder.cursors.get(session, "start"))
            ends = [asyncio.create_task(event.wait()) for event in (self._world.over, carried.ended)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()
        except BROKEN:
            await asyncio.sleep(BACK_OFF_SECONDS)
        finally:
            await carried.close(drop=True)

    def _connect(self, http: aiohttp.ClientSession, visit: Visit) -> Carried:
        self._connections += 1
        slot = self._world.fleet.slot(visit.node)
        session = self._session(visit.session)
        return CARRIERS[visit.carrier](http, slot, self._recorder, session, self._connections)

    def _note_move(self, visit: Visit) -> None:
        place = visit.node, visit.carrier
        if self._last_place is not None:
            self._world.figures["moves to another node"] += self._last_place[0] != place[0]
            self._world.figures["moves to another carrier"] += self._last_place[1] != place[1]
        self._last_place = place

    def _where(self, visit: Visit) -> str:
        if visit.where != "cursor":
            return visit.where
        return self._recorder.cursors.get(self._session(visit.session), "start")

    async def _idle(self, seconds: float, carried: Carried, visit: Visit) -> bool:
        """Wait; False: go."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await carried.ended.wait()
                return False
        return not (self._world.calm.is_set() or (visit.heeds_goaway and carried.told_to_go.is_set()))

    # -- what it does

    async def _do(self, carried: Carried, act: Act, turn: str) -> None:
        session = carried.session
        match act.deed:
            case "send" | "interrupt":
                await self._tell(carried, act, self._send(session, turn, act))
            case "send-twice":
                command = self._send(session, turn, act)
                self._world.figures["repeated sends"] += 1
                await asyncio.gather(self._tell(carried, act, command), self._tell(carried, act, command))
            case "send-and-again":
                command = self._send(session, turn, act)
                self._world.figures["repeated sends"] += 1
                other = carried.post(command, self._world.fleet.slot(act.node))
                await asyncio.gather(self._tell(carried, act, command), other)
            case "again":
                earlier = [command for name, command in self._sent if name == session]
                if earlier:
                    self._world.figures["repeated sends"] += 1
                    await self._tell(carried, act, earlier[int(act.dice * len(earlier))])
            case "cancel":
                named = self._world.running.one_of(session, act.dice)
                if named is not None:
                    await self._tell(carried, act, {"type": "cancel", "session": session, "turn": named})
            case "cancel-all":
                await self._tell(carried, act, {"type": "cancel", "session": session})
            case "cancel-early":
                await self._tell(carried, act, {"type": "cancel", "session": session, "turn": turn})
                await asyncio.sleep(act.dice * EARLY_SECONDS)
                await self._tell(carried, act, self._send(session, turn, act))
            case _:
                await self._do_on_socket(carried, act)

    async def _do_on_socket(self, carried: Carried, act: Act) -> None:
        if isinstance(carried, Socket) and not carried.ended.is_set():
            match act.deed:
                case "attach":
                    places = ("start", "running", self._recorder.cursors.get(carried.session, "start"))
                    await carried.attach(places[int(act.dice * 3)])
                case "detach":
                    await carried.ask({"type": "detach", "session": carried.session})
                case _:
                    await carried.ask({"type": "ping"})

    async def _tell(self, carried: Carried, act: Act, command: dict[str, Any]) -> None:
        """By the socket, or by POST, to whichever node."""
        if isinstance(carried, Socket) and not act.posts and not carried.ended.is_set():
            await carried.ask(command)
        else:
            await carried.post(command, self._world.fleet.slot(act.node))

    def _send(self, session: str, turn: str, act: Act) -> dict[str, Any]:
        plan = plans.answer(self._world.seed, turn, self._world.scale)
        command = {
            "type": "send", "session": session, "turn": turn,
            "body": send_body(turn, turn=turn, plan=plan),
            **({"overlap": "interrupt"} if act.deed == "interrupt" else {}),
        }  # fmt: skip
        self._sent = [*self._sent, (session, command)][-REMEMBERED_TURNS:]
        return command

    def _session(self, number: int) -> str:
        return session_name(self._world.seed, number)

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
