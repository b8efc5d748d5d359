"""A lane's connection against a server that misbehaves: what a real one does too seldom to wait for."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import hiredis
import pytest
from structlog.testing import capture_logs

from gateway import store
from gateway.store import Lane, Store, StoreUnavailable, load_script
from gateway.store import lane as lane_module
from gateway.store.exchange import Exchange
from gateway.store.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

CLAIM = load_script("claim")
SHORT_SECONDS = 0.2


class Server:
    """Speaks as much of the protocol as a lane needs; a test says what it answers to a script's call."""

    def __init__(self, answer: Callable[[Server, str], bytes]) -> None:
        self._answer = answer
        self.connections = 0
        self.greeted = self.loaded = b"+OK\r\n"
        self.commands: list[str] = []
        self.batches: list[int] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        reader = hiredis.Reader(encoding="utf-8")
        while data := await stream.read(65_536):
            reader.feed(data)
            calls = 0
            while (command := reader.gets()) is not False:
                self.commands.append(command[0])
                if command[0] == "EVALSHA":
                    calls += 1
                    writer.write(self._answer(self, command[-1]))
                else:
                    writer.write(self.loaded if command[0] == "SCRIPT" else self.greeted)
            if calls:
                self.batches.append(calls)


def echo(server: Server, value: str) -> bytes:
    del server
    return b"$%d\r\n%b\r\n" % (len(value), value.encode())


@asynccontextmanager
async def lane_to(server: Server) -> AsyncIterator[Lane]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        async with Store(f"redis://127.0.0.1:{port}", (CLAIM,)) as opened:
            assert isinstance(opened.writes, Lane)
            yield opened.writes
    finally:
        for writer in server.writers:
            writer.transport.abort()
        listening.close()
        await listening.wait_closed()


def ask(lane: Lane, value: str) -> asyncio.Future[Any]:
    return lane.call(CLAIM, ("key",), (value,))


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "OPERATION_TIMEOUT_SECONDS", SHORT_SECONDS)


async def gone(lane: Lane) -> None:
    """Until the lane knows that its connection ended."""
    async with asyncio.timeout(5):
        while lane._pipeline is not None:  # noqa: ASYNC110 - nobody but a test waits for it
            await asyncio.sleep(0.001)


async def test_no_call_leaves_while_a_batch_is_away() -> None:
    """One batch in flight: what waits is in our memory, counted, and goes as one."""
    asked = asyncio.Event()

    def first_is_held(server: Server, value: str) -> bytes:
        if value == "first":
            asked.set()
            return b""
        return echo(server, value)

    server = Server(first_is_held)
    async with lane_to(server) as lane:
        assert await ask(lane, "before") == b"before"
        calls = [ask(lane, "first")]
        async with asyncio.timeout(5):
            await asked.wait()
        for number in range(20):
            calls.append(ask(lane, str(number)))
            await asyncio.sleep(0)
        assert server.batches[1:] in ([], [1])
        server.writers[0].write(b"$5\r\nfirst\r\n")
        assert await asyncio.gather(*calls) == [b"first", *(str(number).encode() for number in range(20))]
    assert server.batches == [1, 1, 20]


async def test_scripts_are_loaded_before_the_first_call_of_a_connection() -> None:
    """A server that was replaced has none: what it does not know would be carried out after what it knows."""
    server = Server(echo)
    async with lane_to(server) as lane:
        for value in ("a", "b"):
            server.commands.clear()
            assert await ask(lane, value) == value.encode()
            assert server.commands[-2:] == ["SCRIPT", "EVALSHA"]
            server.writers[-1].close()
            await gone(lane)


async def test_a_server_that_does_not_take_our_scripts_is_unavailable() -> None:
    """One that is too old, or may not: the next one may be better, and none of its replies is a call's."""
    server = Server(echo)
    server.loaded = b"-ERR unable to compile\r\n"
    async with lane_to(server) as lane:
        with pytest.raises(StoreUnavailable):
            await ask(lane, "a")
        server.loaded = b"+OK\r\n"
        assert await ask(lane, "b") == b"b"


async def test_callers_that_were_answered_together_ask_together() -> None:
    """Fifty turns that each wait for their append share each next batch too, instead of falling into two."""
    server = Server(echo)
    async with lane_to(server) as lane:

        async def append(name: str) -> None:
            for _ in range(10):
                await ask(lane, name)

        await asyncio.gather(*(append(str(number)) for number in range(50)))
    assert server.batches == [50] * 10


async def test_replies_may_come_in_pieces() -> None:
    """A network cuts where it likes."""
    server = Server(lambda _, __: b"")
    async with lane_to(server) as lane:
        calls = [ask(lane, "a"), ask(lane, "b")]
        async with asyncio.timeout(5):
            while not server.batches:  # noqa: ASYNC110 - nobody but a test waits for it
                await asyncio.sleep(0.001)
        for byte in b"*2\r\n$1\r\na\r\n:7\r\n$-1\r\n":
            server.writers[0].write(bytes((byte,)))
            await asyncio.sleep(0.001)
        assert await asyncio.gather(*calls) == [[b"a", 7], None]


@pytest.mark.parametrize("unasked", [b"+OK\r\n", b"?what\r\n"])
async def test_what_nobody_asked_for_is_nobodys_reply(unasked: bytes) -> None:
    """A stray reply would shift all later ones by one caller."""
    server = Server(echo)
    async with lane_to(server) as lane:
        assert await ask(lane, "a") == b"a"
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        with capture_logs() as logs:
            server.writers[0].write(unasked)
            await gone(lane)
            assert await ask(lane, "b") == b"b"
    assert [entry["event"] for entry in logs] == ["store.disconnected"]
    assert errors == []
    assert server.connections == 2


async def test_a_connection_that_says_too_much_before_it_is_used_is_not_used() -> None:
    """What redis-py read and did not need is with its own parser, and out of step with ours."""
    server = Server(echo)
    async with lane_to(server) as lane:
        server.greeted = b"+OK\r\n+OK\r\n"
        with pytest.raises(StoreUnavailable):
            await ask(lane, "a")
        server.greeted = b"+OK\r\n"
        assert await ask(lane, "b") == b"b"


async def test_one_reply_too_many_ends_the_connection() -> None:
    """Every call was answered, but by what cannot be known; nothing more is read from there."""
    server = Server(lambda server, value: echo(server, value) * (1 + (value == "twice")))
    async with lane_to(server) as lane:
        assert await ask(lane, "twice") == b"twice"
        await gone(lane)
        assert await ask(lane, "b") == b"b"
    assert server.connections == 2


@pytest.mark.parametrize(
    "answer", [b"-LOADING Redis is loading\r\n", b"-NOAUTH Authentication required.\r\n", b"?what\r\n"]
)
async def test_a_server_that_refuses_every_call_is_unavailable_and_is_asked_anew(answer: bytes) -> None:
    """It says so on this connection; the next may be to one that is ready."""
    server = Server(lambda server, value: echo(server, value) if server.connections > 1 else answer)
    async with lane_to(server) as lane:
        calls = await asyncio.gather(ask(lane, "a"), ask(lane, "b"), return_exceptions=True)
        assert [type(call) for call in calls] == [StoreUnavailable] * 2
        assert await ask(lane, "c") == b"c"


async def test_what_waited_to_be_sent_again_fails_with_its_batch() -> None:
    """It was told that it failed; carrying it out with a later batch would be a write that nobody expects."""

    def forget_and_hang_up(server: Server, value: str) -> bytes:
        if value == "hang up":
            server.writers[-1].close()
        return b"-NOSCRIPT No matching script.\r\n" if value == "forget" else echo(server, value)

    server = Server(forget_and_hang_up)
    async with lane_to(server) as lane:
        calls = [ask(lane, "forget"), ask(lane, "hang up"), ask(lane, "unanswered")]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(replies[0], StoreUnavailable)
        server.commands.clear()
        assert await ask(lane, "a") == b"a"
        assert await ask(lane, "b") == b"b"
        assert server.commands.count("EVALSHA") == 2


async def test_a_connection_that_is_closing_is_not_written_to() -> None:
    """Its end is known to the transport one turn of the loop before it is told."""
    server = Server(echo)
    async with lane_to(server) as lane:
        assert await ask(lane, "a") == b"a"
        call = ask(lane, "b")
        assert lane._pipeline is not None
        lane._pipeline._transport.close()
        assert await call == b"b"


async def test_a_server_that_hangs_up_after_a_call_fails_it_at_once() -> None:
    """The end of the connection is the answer; nobody waits for the deadline."""

    def hang_up(server: Server, value: str) -> bytes:
        if value == "end":
            server.writers[-1].close()
        return echo(server, value) if value != "end" else b""

    server = Server(hang_up)
    async with lane_to(server) as lane:
        assert await ask(lane, "a") == b"a"
        with pytest.raises(StoreUnavailable):
            async with asyncio.timeout(lane_module.OPERATION_TIMEOUT_SECONDS / 2):
                await ask(lane, "end")
        assert await ask(lane, "b") == b"b"


class Mute(Server):
    """Takes connections, and never says a word."""

    async def serve(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        await stream.read()


@pytest.mark.usefixtures("short_deadline")
async def test_connecting_is_within_the_deadline() -> None:
    """A server that accepts and says nothing is an outage like any other."""
    server = Mute(echo)
    async with lane_to(server) as lane:
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                async with asyncio.timeout(5):
                    await ask(lane, "a")
    assert server.connections == 2


async def test_closing_while_connecting_fails_what_waits() -> None:
    """A node that stops during an outage leaves nobody waiting, and no socket behind."""
    server = Mute(echo)
    async with lane_to(server) as lane:
        call = ask(lane, "a")
        async with asyncio.timeout(5):
            while not server.connections:  # noqa: ASYNC110 - nobody but a test waits for it
                await asyncio.sleep(0.001)
        async with asyncio.timeout(lane_module.OPERATION_TIMEOUT_SECONDS / 2):
            await lane.close()
        with pytest.raises(StoreUnavailable):
            await call


@pytest.mark.usefixtures("short_deadline")
async def test_each_batch_has_the_whole_deadline() -> None:
    """One timer serves many batches: it must not end one that began long after it was set."""
    server = Server(echo)
    async with lane_to(server) as lane:
        loop = asyncio.get_running_loop()
        end = loop.time() + 4 * SHORT_SECONDS
        while loop.time() < end:
            assert await ask(lane, "a") == b"a"


@pytest.mark.usefixtures("short_deadline")
async def test_the_deadline_is_set_anew_for_each_batch() -> None:
    """The timer that the first batch set fires while the last one waits; that one must end too."""
    server = Server(lambda server, value: b"" if value == "never" else echo(server, value))
    async with lane_to(server) as lane:
        for _ in range(3):
            assert await ask(lane, "a") == b"a"
            with pytest.raises(StoreUnavailable):
                async with asyncio.timeout(5):
                    await ask(lane, "never")


async def test_a_connection_is_nobodys_in_particular(monkeypatch: pytest.MonkeyPatch) -> None:
    """It outlives the call it was made for: what that one's context holds must not stay with it."""
    caller: ContextVar[str] = ContextVar("caller", default="nobody")
    seen: list[str] = []
    connect = Pipeline.connect

    async def watched(*arguments: Any) -> Pipeline:
        seen.append(caller.get())
        return await connect(*arguments)

    monkeypatch.setattr(Pipeline, "connect", watched)
    async with lane_to(Server(echo)) as lane:
        caller.set("somebody")
        assert await ask(lane, "a") == b"a"
    assert seen == ["nobody"]


async def test_a_bug_in_a_reply_does_not_leave_its_callers_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a callback is a line in the event loop's log, and nothing else, to those who wait."""
    async with lane_to(Server(echo)) as lane:
        assert await ask(lane, "a") == b"a"
        with monkeypatch.context() as broken:
            broken.setattr(Exchange, "take", None)
            with pytest.raises(store.StoreError):
                async with asyncio.timeout(lane_module.OPERATION_TIMEOUT_SECONDS / 2):
                    await ask(lane, "b")
        assert await ask(lane, "c") == b"c"
