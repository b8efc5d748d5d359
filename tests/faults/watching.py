"""Clients that move between nodes and keep what they were told, and a backend that counts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from tests.support.client import RECORDS, send_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tests.support.backend import Exchange
    from tests.support.process import GatewayProcess

WAIT_SECONDS = 30.0
"""Above what an outage, a lease and a failover take together in these tests."""

RETRY_SECONDS = 0.05
REPLY_SECONDS = 10.0
"""Above all that a command waits for; who is not answered by then has found a bug."""

BROKEN = (aiohttp.ClientError, OSError, TimeoutError)

Record = dict[str, Any]


async def until(holds: Callable[[], bool | Awaitable[bool]], seconds: float = WAIT_SECONDS) -> None:
    """Wait for a condition that nobody announces."""
    async with asyncio.timeout(seconds):
        while True:
            found = holds()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)


# -- the backend


class Numbers:
    """A script: an answer whose words are ``0 1 2 ...``, at a pace or as far as it is allowed.

    Args:
        allowed: How many words each answer may say; more by :meth:`allow`.
        pace_seconds: Between two words.

    Attributes:
        said: By the question's text, how many words were said.
        asked: How often each question was asked.
        closed: The questions whose connection the gateway closed before the end.
    """

    def __init__(self, allowed: float = 0, *, pace_seconds: float = 0.0) -> None:
        self.said: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.closed: set[str] = set()
        self._allowed = allowed
        self._pace_seconds = pace_seconds
        self._is_over = False
        self._changed = asyncio.Condition()

    async def allow(self, count: float) -> None:
        """Each answer may say so many words."""
        async with self._changed:
            self._allowed = count
            self._changed.notify_all()

    async def says_more(self, count: int) -> None:
        """Wait until each answer has said so many words more, whoever hears them."""
        before = dict(self.said)
        await until(lambda: all(self.said[question] >= said + count for question, said in before.items()))

    async def finish(self) -> None:
        """End all answers in good order, those to come as well, after the words that they may say."""
        async with self._changed:
            self._is_over = True
            if self._allowed == float("inf"):
                self._allowed = 0
            self._changed.notify_all()

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        question = exchange.json["messages"][-1]["parts"][0]["text"]
        self.asked[question] = self.asked.get(question, 0) + 1
        self.said[question] = 0
        await exchange.head()
        await exchange.text(finish=False)
        answer = asyncio.create_task(self._answer(exchange, question))
        close = asyncio.create_task(exchange.was_closed.wait())
        try:
            await asyncio.wait({answer, close}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.closed.add(question)
            else:
                answer.result()
        except ConnectionError:
            self.closed.add(question)
        finally:
            answer.cancel()
            close.cancel()
            await asyncio.gather(answer, close, return_exceptions=True)

    async def _answer(self, exchange: Exchange, question: str) -> None:
        for number in itertools.count():
            async with self._changed:
                while number >= self._allowed and not self._is_over:
                    await self._changed.wait()
            if number >= self._allowed:
                break
            await exchange.text(f"{number} ", start=False, finish=False)
            self.said[question] = number + 1
            if self._pace_seconds:
                await asyncio.sleep(self._pace_seconds)
        await exchange.text(start=False)


def numbers(count: int) -> str:
    """What an answer of so many words says."""
    return "".join(f"{number} " for number in range(count))


def text_of(records: Sequence[Record], turn: str) -> str:
    """What the text deltas of a turn add up to."""
    chunks = [r["data"] for r in records if r["type"] == "chunk" and r["turn"] == turn and "data" in r]
    return "".join(chunk["delta"] for chunk in chunks if chunk.get("type") == "text-delta")


def ends_of(records: Sequence[Record]) -> dict[str, str]:
    """The reason of each turn's end; each has one at the most."""
    ends = [record for record in records if record["type"] == "turn-end"]
    reasons = {record["turn"]: record["reason"] for record in ends}
    assert len(reasons) == len(ends), f"a turn ended twice: {ends}"
    return reasons


# -- commands


async def command(address: str, client: str = "commander", **members: Any) -> dict[str, Any]:
    """Give one command to a node; returns its reply. It attaches nobody."""
    async with (
        asyncio.timeout(REPLY_SECONDS),
        aiohttp.ClientSession() as http,
        http.post(
            f"http://{address}/gateway/v1/commands?client={client}", json={"id": "1", **members}
        ) as response,
    ):
        reply: dict[str, Any] = await response.json()
        return reply


async def send(address: str, session: str, turn: str, **members: Any) -> dict[str, Any]:
    """Send, with the session and the turn as the question; returns the reply."""
    body = send_body(f"{session}/{turn}")
    return await command(address, type="send", session=session, turn=turn, body=body, **members)


async def send_until_accepted(address: str, session: str, turn: str) -> dict[str, Any]:
    """Send, again as long as that is refused as retryable."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            reply = await send(address, session, turn)
            if reply["type"] == "accepted":
                return reply
            assert reply["retryable"], reply
            await asyncio.sleep(RETRY_SECONDS)


# -- clients


class Chronicle:
    """What all clients of a test were told, held against each other: one cursor, one content.

    Args:
        by_offset: So it is also for one offset of one epoch; not where nobody is left who knows of a loss.
    """

    def __init__(self, *, by_offset: bool = True) -> None:
        self._by_offset = by_offset
        self._told: dict[tuple[str, str], Record] = {}
        self._at: dict[tuple[str, str, int], Record] = {}

    def note(self, session: str, record: Record) -> None:
        """A client was shown a record."""
        cursor, offset = record["cursor"], record["offset"]
        epoch = cursor.partition(".")[0]
        known = [self._told.setdefault((session, cursor), record)]
        if self._by_offset:
            known.append(self._at.setdefault((session, epoch, offset), record))
        for other in known:
            assert other == record, f"two contents at {cursor}: {other} and {record}"


class Watcher:
    """A client of one session that comes back by its cursor, to the next node, whenever it is cut off.

    Args:
        session: Which.
        addresses: Of the nodes, those it goes to first in front.
        chronicle: Shared by the clients of a test.

    Attributes:
        views: What it was shown; a new one with each ``resync``. Each is gapless and without duplicates.
        resyncs: The reasons.
        attaches: How often it has attached.
        refusals: Codes of the attaches that were refused.
        last_told: The newest offset when it attached.
    """

    def __init__(self, session: str, *addresses: str, chronicle: Chronicle | None = None) -> None:
        self.session = session
        self.addresses = list(addresses)
        self.views: list[list[Record]] = [[]]
        self.resyncs: list[str] = []
        self.attaches = 0
        self.refusals: list[str] = []
        self.is_attached = False
        self.last_told = 0
        self._chronicle = chronicle or Chronicle()
        self._cursor: str | None = None
        self._last: int | None = None
        self._changed = asyncio.Condition()
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession()
        self._task = asyncio.create_task(self._run(), name=f"watcher-{self.session}")
        return self

    async def __aexit__(self, *exception: object) -> None:
        failed = self._task.done()
        self._task.cancel()
        (result,) = await asyncio.gather(self._task, return_exceptions=True)
        await self._http.close()
        if failed and exception[0] is None and isinstance(result, Exception):
            raise result

    @property
    def view(self) -> list[Record]:
        """What it shows now."""
        return self.views[-1]

    async def wait(self, holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        """Wait until something holds of what it was told."""
        waiting = asyncio.create_task(self._wait(holds))
        done, _ = await asyncio.wait(
            {waiting, self._task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if waiting not in done:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            if self._task.done():
                self._task.result()
            raise TimeoutError(f"{self.session}: {self.resyncs} {self.refusals} {self.view[-3:]}")
        waiting.result()

    async def attached(self) -> None:
        """Wait until it is."""
        await self.wait(lambda: self.is_attached)

    async def detached(self) -> None:
        """Wait until it is not, for it was cut off."""
        await self.wait(lambda: not self.is_attached)

    async def has_words(self, turn: str, count: int) -> None:
        """Wait until it was shown so many words of a turn."""
        await self.wait(lambda: text_of(self.view, turn).count(" ") >= count)

    async def has(self, count: int) -> None:
        """Wait until it shows so many records."""
        await self.wait(lambda: len(self.view) >= count)

    async def has_whole(self, turn: str, words: int) -> None:
        """Wait until it shows all of a turn: so many words, and its end."""
        await self.wait(lambda: text_of(self.view, turn) == numbers(words) and turn in ends_of(self.view))

    async def ended_all(self, *turns: str) -> None:
        """Wait until it shows the ends of these turns, and no other."""
        await self.wait(lambda: set(ends_of(self.view)) == set(turns))

    async def came_back(self, times: int) -> None:
        """Wait until it has attached more often than that, and is attached."""
        await self.wait(lambda: self.attaches > times and self.is_attached)

    async def shows(self, records: list[Record]) -> None:
        """Wait until it shows exactly this."""
        await self.wait(lambda: self.view == records)

    async def resynced(self) -> None:
        """Wait until it was told to begin anew."""
        await self.wait(lambda: bool(self.resyncs))

    async def ended(self, turn: str) -> Record:
        """Wait for a turn's end in what it shows now."""

        def end() -> Record | None:
            return next((r for r in self.view if r["type"] == "turn-end" and r["turn"] == turn), None)

        await self.wait(lambda: end() is not None)
        found = end()
        assert found is not None
        return found

    def cut(self) -> None:
        """Lose the connection without a word."""
        if self._socket is not None and self._socket._response.connection is not None:
            transport = self._socket._response.connection.transport
            if transport is not None:
                transport.abort()

    async def _wait(self, holds: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(holds)

    async def _run(self) -> None:
        for number in itertools.count():
            address = self.addresses[number % len(self.addresses)]
            with contextlib.suppress(*BROKEN):
                async with asyncio.timeout(REPLY_SECONDS):
                    self._socket = await self._http.ws_connect(
                        f"http://{address}/gateway/v1/ws", protocols=["session-gateway.v1"], max_msg_size=0
                    )
                await self._follow(self._socket)
            async with self._changed:
                self.is_attached = False
                self._changed.notify_all()
            await asyncio.sleep(RETRY_SECONDS)

    async def _follow(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async with socket:
            await self._attach(socket)
            async for frame in socket:
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    continue
                async with self._changed:
                    for line in frame.data.split("\n"):
                        await self._take(socket, json.loads(line))
                    self._changed.notify_all()

    async def _attach(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        after = {} if self._cursor is None else {"after": self._cursor}
        self.attaches += 1
        await socket.send_str(json.dumps({"type": "attach", "id": "a", "session": self.session, **after}))

    async def _take(self, socket: aiohttp.ClientWebSocketResponse, line: Record) -> None:
        match line["type"]:
            case "attached":
                if "resync" in line:
                    self._begin_anew(line["resync"])
                self._cursor = self._cursor or line["cursor"]
                self.last_told = line["last"]
                self.is_attached = True
            case "error":
                assert line["retryable"], line
                self.refusals.append(line["code"])
                await asyncio.sleep(RETRY_SECONDS)
                await self._attach(socket)
            case "resync":
                self._begin_anew(line["reason"])
                self._cursor = None
                await self._attach(socket)
            case "goaway":
                await socket.close()
            case kind if kind in RECORDS:
                self._show(line)
            case _:
                pass  # hello, heartbeats

    def _begin_anew(self, reason: str) -> None:
        self.resyncs.append(reason)
        self.views.append([])
        self._cursor = self._last = None
        self.is_attached = False

    def _show(self, record: Record) -> None:
        offset = record["offset"]
        expected = 1 if self._last is None else self._last + 1
        assert offset == expected, f"{self.session}: {offset} came where {expected} was due"
        self._chronicle.note(self.session, record)
        self._last, self._cursor = offset, record["cursor"]
        self.view.append(record)


class Crowd:
    """Many sessions, each with a running turn ``t`` and a client.

    Args:
        script: Of the backend.
        addresses: Of the nodes; session ``i`` is sent to number ``i``, and around.
        count: How many sessions.
        away: By how many nodes its client is further on than its producer.
    """

    def __init__(self, script: Numbers, addresses: Sequence[str], count: int, *, away: int = 0) -> None:
        self._script = script
        self._addresses = list(addresses)
        self._away = away
        self.sessions = [f"s{number}" for number in range(count)]
        self.watchers: list[Watcher] = []
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            for number, session in enumerate(self.sessions):
                watcher = Watcher(session, *self._from(number + self._away))
                self.watchers.append(await stack.enter_async_context(watcher))
            for watcher in self.watchers:
                await watcher.attached()
            replies = await asyncio.gather(
                *(send(self._from(n)[0], session, "t") for n, session in enumerate(self.sessions))
            )
            assert {reply["type"] for reply in replies} == {"accepted"}
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    async def words(self, count: int) -> None:
        """Wait until every client was shown so many words."""
        for watcher in self.watchers:
            await watcher.has_words("t", count)

    async def ended(self) -> dict[str, Record]:
        """Wait until every client was shown its turn's end; by session."""
        return {watcher.session: await watcher.ended("t") for watcher in self.watchers}

    def assert_whole(self, *, attaches: int | None = None) -> None:
        """Everybody was shown all that the backend said, once, and was told nothing of what happened."""
        for watcher in self.watchers:
            said = self._script.said[f"{watcher.session}/t"]
            assert watcher.resyncs == []
            assert text_of(watcher.view, "t") == numbers(said)
            assert ends_of(watcher.view) == {"t": "complete"}
            assert attaches is None or watcher.attaches == attaches
        assert self._script.asked == {f"{session}/t": 1 for session in self.sessions}

    def _from(self, number: int) -> list[str]:
        first = number % len(self._addresses)
        return self._addresses[first:] + self._addresses[:first]


async def whole_journal(address: str, session: str) -> list[Record]:
    """What whoever comes now is shown of a session whose turns have ended."""
    async with Watcher(session, address) as late:
        await late.attached()
        await late.wait(lambda: len(late.view) >= late.last_told)
        return late.view


# -- what a node says of itself


async def metric(address: str, name: str, **labels: str) -> float:
    """A metric of a node, by its operators' address; 0 where it has not been counted."""
    async with aiohttp.ClientSession() as http, http.get(f"http://{address}/metrics") as response:
        for line in (await response.text()).splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                return float(value)
    return 0.0


async def readiness(address: str) -> int:
    """The status of ``/readyz``."""
    async with aiohttp.ClientSession() as http, http.get(f"http://{address}/readyz") as response:
        return response.status


def cpu_seconds(process: GatewayProcess) -> float:
    """What a process has had of the processors."""
    fields = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(process: GatewayProcess) -> int:
    """What a process has of the memory."""
    pages = Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def faults_of(process: GatewayProcess, *expected: str) -> list[dict[str, Any]]:
    """What a node logged as an error, or wrote that is no log, but for the events expected."""
    return [
        line
        for line in process.log
        if (line.get("level") in {"error", "critical"} and line.get("event") not in expected)
        or "Traceback" in line.get("text", "")
    ]
