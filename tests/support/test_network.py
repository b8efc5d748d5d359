"""The network does what it is told, and without being told nothing at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import random
import socket
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self, get_args

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.network import HEAD_BYTES, Fault, Framing, Head, Kind, Mark, Network, _forecast
from tests.support.wires import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_SECONDS = 15.0
LONG = "x" * 3_000_000
NEVER = 1000.0
EVENTS = b"data: one\n\ndata: two\n\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

both_ends = pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])


class Site:
    """A small site behind the network.

    Attributes:
        heard: What came on WebSockets.
        asked: The paths of the requests.
        go_on: Lets ``/events`` say the second event, and end.
    """

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.asked: list[str] = []
        self.go_on = asyncio.Event()

    async def __aenter__(self) -> Self:
        site = web.Application(client_max_size=0)
        site.router.add_get("/ws", self._echo)
        site.router.add_get("/events", self._events)
        site.router.add_post("/long", self._long)
        site.router.add_get("/chunked", self._chunked)
        self._runner = web.AppRunner(site, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*listener.getsockname())
        await web.SockSite(self._runner, listener).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def settle(self) -> None:
        """Give whatever could come by the network ample time to do so."""
        async with aiohttp.ClientSession() as http:
            for _ in range(20):
                async with http.get(f"http://{self.address}/chunked") as answer:
                    await answer.read()

    async def _echo(self, request: web.Request) -> web.WebSocketResponse:
        self.asked.append(request.path)
        echo = web.WebSocketResponse(max_msg_size=0)
        await echo.prepare(request)
        async for message in echo:
            self.heard.append(message.data)
            with contextlib.suppress(ConnectionError):
                await echo.send_str(message.data)
        return echo

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        first, second = EVENTS[:11], EVENTS[11:]
        with contextlib.suppress(ConnectionError):
            await answer.write(first)
            await self.go_on.wait()
            await answer.write(second)
        return answer

    async def _long(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        return web.json_response({"got": hashlib.sha256(await request.read()).hexdigest(), "long": LONG})

    async def _chunked(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            for word in (b"a", b"b", b"c"):
                await answer.write(word * 1000)
        return answer


class Server:
    """A raw server that gives its connections out, one by one."""

    async def __aenter__(self) -> Self:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)  # noqa: FBT003 - positional only
        self.address = "{}:{}".format(*self.listener.getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()

    async def taken(self) -> Raw:
        """The next connection."""
        async with asyncio.timeout(WAIT_SECONDS):
            end, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        return Raw(end)


class Raw:
    """One end of a connection, without buffers of its own."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.setblocking(False)  # noqa: FBT003 - positional only
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()

    @classmethod
    async def to(cls, address: str) -> Raw:
        host, _, port = address.partition(":")
        made = cls(socket.socket())
        await made._loop.sock_connect(made.end, (host, int(port)))
        return made

    async def say(self, data: bytes) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            await self._loop.sock_sendall(self.end, data)

    async def hear(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        heard = b""
        async with asyncio.timeout(WAIT_SECONDS):
            while len(heard) < count and (data := await self._loop.sock_recv(self.end, count - len(heard))):
                heard += data
        return heard

    async def rest(self) -> tuple[bytes, bool]:
        """All that still comes, and whether a reset ended it."""
        heard = b""
        async with asyncio.timeout(WAIT_SECONDS):
            try:
                while data := await self._loop.sock_recv(self.end, 65_536):
                    heard += data
            except ConnectionResetError:
                return heard, True
        return heard, False

    def hears_nothing(self) -> bool:
        try:
            self.end.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site
        site.go_on.set()


@pytest.fixture
async def network(site: Site) -> AsyncIterator[Network]:
    async with Network(site.address) as network:
        yield network
    assert network.open == 0
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("network")]


@pytest.fixture
async def http(network: Network) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        f"http://{network.address}", timeout=aiohttp.ClientTimeout(WAIT_SECONDS)
    ) as http:
        yield http


@contextlib.asynccontextmanager
async def line() -> AsyncIterator[tuple[Network, Raw, Raw]]:
    """A network with one connection through it: its client's end and its server's."""
    async with Server() as server, Network(server.address) as network:
        with await Raw.to(network.address) as client, await server.taken() as served:
            yield network, client, served


def files() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def long(http: aiohttp.ClientSession, body: bytes = b"") -> bool:
    """Ask for the long JSON; returns whether it is right."""
    async with http.post("/long", data=io.BytesIO(body)) as answer:
        told = await answer.json()
    return bool(told == {"got": hashlib.sha256(body).hexdigest(), "long": LONG})


# ── passing through ──────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    up=st.lists(st.binary(min_size=1, max_size=3000), max_size=5),
    down=st.lists(st.binary(min_size=1, max_size=3000), max_size=5),
    split=st.sampled_from([None, 1, 7, 1000]),
    delay=st.sampled_from([0.0, 0.001]),
    buffers=st.booleans(),
)
@example(up=[UPGRADE], down=[b"HTTP/1.1 101 x\r\n\r\n", b"\r\n\x00"], split=1, delay=0.0, buffers=True)
@example(
    up=[b"GET / HTTP/1.1\r\n\r\n"],
    down=[b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", EVENTS],
    split=7,
    delay=0.0,
    buffers=True,
)
async def test_bytes_pass_unchanged(
    up: list[bytes], down: list[bytes], split: int | None, delay: float, *, buffers: bool
) -> None:
    """However they are cut and delayed, and whatever they look like."""
    async with line() as (network, client, served):
        network.split, network.delay_seconds, network.buffer_streams = split, delay, buffers

        async def speak(end: Raw, said: list[bytes]) -> None:
            for data in said:
                await end.say(data)
            end.end.shutdown(socket.SHUT_WR)

        ends = await asyncio.gather(speak(client, up), speak(served, down), served.rest(), client.rest())
        assert tuple(ends[2:]) == ((b"".join(up), False), (b"".join(down), False))
        await network.connections(0)


async def test_a_site_works_through_it(site: Site, network: Network, http: aiohttp.ClientSession) -> None:
    """WebSocket, long answer, long request and stream, torn into small pieces."""
    network.split = 4099
    async with http.ws_connect("/ws", max_msg_size=0) as echo:
        await echo.send_str(LONG)
        assert await echo.receive_str() == LONG
    assert await long(http, LONG.encode())
    site.go_on.set()
    async with http.get("/events") as answer:
        assert await answer.read() == EVENTS
    assert network.accepted == 2
    assert min(network.bytes_up, network.bytes_down) > 2 * len(LONG)


@pytest.mark.parametrize("upwards", [True, False])
async def test_a_reader_that_is_slow_holds_its_writer_up(*, upwards: bool) -> None:
    """A proxy that read ahead would hide a slow client from the gateway."""
    async with line() as (_, client, served):
        writer, reader = (client, served) if upwards else (served, client)
        block = random.Random(1).randbytes(1_000_003)
        total, sent, stalled = 400 * len(block), 0, 0
        while stalled < 2000 and sent < total:
            try:
                sent += writer.end.send(block[sent % len(block) :])
                stalled = 0
            except BlockingIOError:
                stalled += 1
                await asyncio.sleep(0)
        assert sent < total
        writer.end.shutdown(socket.SHUT_WR)
        heard, told = hashlib.sha256(), hashlib.sha256()
        count = 0
        while data := await reader.hear(1_000_003):
            heard.update(data)
            told.update(block[: len(data)])
            count += len(data)
        assert (count, heard.digest()) == (sent, told.digest())


async def test_a_half_closed_connection_goes_on() -> None:
    """A client that has nothing more to say may still listen."""
    async with line() as (network, client, served):
        client.end.shutdown(socket.SHUT_WR)
        assert await served.hear(1) == b""
        await served.say(b"still here")
        assert await client.hear(10) == b"still here"
        assert network.open == 1


@pytest.mark.parametrize("of_client", [True, False])
async def test_a_reset_of_one_side_reaches_the_other(*, of_client: bool) -> None:
    """A gateway must learn of a lost client as if there were no proxy."""
    async with line() as (network, client, served):
        gone, other = (client, served) if of_client else (served, client)
        gone.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.end.close()
        assert await other.rest() == (b"", True)
        assert network.cuts == 0


async def test_a_gateway_that_is_down_resets_its_clients() -> None:
    """And one that comes up elsewhere is reached by its new address."""
    async with Server() as server:
        gone = server.address
    async with Server() as server, Network(gone) as network:
        with await Raw.to(network.address) as client:
            assert await client.rest() == (b"", True)
        network.target = server.address
        with await Raw.to(network.address) as client, await server.taken() as served:
            await client.say(b"there")
            assert await served.hear(5) == b"there"


async def test_thousands_of_connections_leave_nothing(network: Network) -> None:
    """One network serves a long test."""
    before = files()

    async def visit(number: int) -> None:
        with await Raw.to(network.address) as client:
            if number % 3:
                await client.say(b"GET /chunked HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                heard, _ = await client.rest()
                assert heard.endswith(b"c" * 1000 + b"\r\n0\r\n\r\n")

    for start in range(0, 3000, 100):
        await asyncio.gather(*(visit(start + number) for number in range(100)))
    await network.until(lambda: network.accepted == 3000)
    await network.connections(0)
    await eventually(lambda: not network._tasks)
    await eventually(lambda: files() <= before)


async def test_a_failure_of_its_own_is_told() -> None:
    """A test must not pass on a network that is none."""
    network = await Network("127.0.0.1:nowhere").__aenter__()
    with await Raw.to(network.address) as client:
        await client.rest()
    with pytest.raises(ExceptionGroup, match="unable to be the network"):
        await network.__aexit__()


# ── cuts ─────────────────────────────────────────────────────────────────────────────────────────────


@both_ends
async def test_a_cut_ends_both_sides_of_every_connection(*, reset: bool) -> None:
    """As a network does it (reset), or a proxy that restarts (closed)."""
    async with Server() as server, Network(server.address) as network:
        with (
            await Raw.to(network.address) as one,
            await server.taken() as one_served,
            await Raw.to(network.address) as two,
            await server.taken() as two_served,
        ):
            assert network.cut(reset=reset) == 2
            assert (network.open, network.cuts) == (0, 2)
            for end in (one, one_served, two, two_served):
                assert await end.rest() == (b"", reset)
        with await Raw.to(network.address) as client, await server.taken() as served:
            await client.say(b"again")
            assert await served.hear(5) == b"again"


@pytest.mark.parametrize("unread", [0, 3_000_000])
async def test_a_connection_closed_in_good_order_is_never_reset(unread: int) -> None:
    """Bytes that nobody reads any more would turn a close into a reset."""
    async with line() as (network, client, served):
        served.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        saying = asyncio.create_task(served.say(b"x" * unread))
        network.freeze()
        await client.say(b"unread")
        network.cut(reset=False)
        assert await client.rest() == (b"", False)
        assert client.end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        await asyncio.gather(saying, return_exceptions=True)


@both_ends
@pytest.mark.parametrize("count", [0, 1, 100_001])
async def test_a_connection_is_cut_after_so_many_bytes(count: int, *, reset: bool) -> None:
    """To the byte: the middle of a frame is where resuming goes wrong."""
    said = random.Random(2).randbytes(200_000)
    async with Server() as server, Network(server.address) as network:
        network.cut_after(bytes_down=count, reset=reset)
        with await Raw.to(network.address) as client, await server.taken() as served:
            with contextlib.suppress(ConnectionError):
                await served.say(said)
            assert await client.rest() == (said[:count], reset)
            assert network.cuts == 1
        with await Raw.to(network.address) as client, await server.taken() as served:
            await served.say(said[:120_000])
            assert await client.hear(120_000) == said[:120_000]


async def test_a_websocket_breaks_in_the_midst_of_a_frame(network: Network) -> None:
    """And its client says so."""
    network.cut_after(bytes_down=5000)
    async with aiohttp.ClientSession() as http, http.ws_connect(f"http://{network.address}/ws") as echo:
        await echo.send_str("x" * 10_000)
        message = await echo.receive(WAIT_SECONDS)
        assert message.type in {aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE}


# ── frost ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_frozen_connection_passes_what_piled_up(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """A laptop that was asleep for a moment."""
    async with http.ws_connect("/ws", max_msg_size=0) as echo:
        await echo.send_str("before")
        assert await echo.receive_str() == "before"
        network.freeze()
        await echo.send_str("one")
        await echo.send_str("two")
        await site.settle()
        assert (site.heard, network.open) == (["before"], 1)
        network.thaw()
        assert [await echo.receive_str(), await echo.receive_str()] == ["one", "two"]


async def test_what_is_under_way_when_the_frost_comes_stops(site: Site) -> None:
    """Also a chunk in the network's hand, and one written half."""
    async with line() as (network, client, served):
        network.delay_seconds = NEVER
        await served.say(b"delayed")
        await network.until(lambda: network.bytes_down == 7)
        network.freeze()
        network.delay_seconds = 0.0
        await site.settle()
        assert client.hears_nothing()
        network.thaw()
        assert await client.hear(7) == b"delayed"


@both_ends
@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("connecting", [True, False])
async def test_an_end_is_not_seen_before_the_thaw(
    site: Site, *, connecting: bool, discard: bool, reset: bool
) -> None:
    """Who sleeps does not hear that the other one left."""
    async with line() as (network, client, served):
        if not connecting:
            await served.say(b"!")
            assert await client.hear(1) == b"!"
        network.freeze(discard=discard)
        if reset:
            served.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        served.end.close()
        network.split = 9  # whoever looks again still finds the frost
        await site.settle()
        assert client.hears_nothing()
        network.thaw()
        assert await client.rest() == (b"", reset)


async def test_nothing_is_read_in_the_frost(site: Site) -> None:
    """Its peers get held up, when the buffers of the kernel are full."""
    async with line() as (network, client, served):
        await served.say(b"!")
        assert await client.hear(1) == b"!"
        network.freeze()
        await served.say(b"piled up")
        await site.settle()
        network.split = 3  # whoever looks again still finds the frost
        await site.settle()
        assert network.bytes_down == 1
        network.thaw()
        assert await client.hear(8) == b"piled up"


async def test_a_frozen_reader_that_discards_holds_nobody_up() -> None:
    """Its connection has a hole then, and dies of it as it wakes; one that lost nothing lives."""
    async with Server() as server, Network(server.address) as network:
        with (
            await Raw.to(network.address) as loser,
            await server.taken() as loser_served,
            await Raw.to(network.address) as quiet,
            await server.taken() as quiet_served,
        ):
            network.freeze(discard=True)
            for _ in range(100):
                await loser_served.say(b"x" * 1_000_000)
            assert loser.hears_nothing()
            assert network.bytes_down == 0
            await network.until(lambda: sum(each.lost for each in network._connections) == 1)
            network.thaw()
            assert await loser.rest() == (b"", True)
            await quiet_served.say(b"alive")
            assert await quiet.hear(5) == b"alive"
            assert (network.cuts, network.open) == (1, 1)


async def test_a_newcomer_in_the_frost_is_accepted_and_hears_nothing(site: Site, network: Network) -> None:
    """As on a network that drops every packet, but for the handshake."""
    network.freeze()
    with await Raw.to(network.address) as client:
        await client.say(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
        await network.connections(1)
        await site.settle()
        assert (site.asked, client.hears_nothing()) == ([], True)
        network.thaw()
        assert await client.hear(12) == b"HTTP/1.1 200"


async def test_a_newcomer_in_the_frost_is_unknown_to_the_gateway(site: Site) -> None:
    """It comes with the thaw."""
    async with Server() as server, Network(server.address) as network:
        network.freeze()
        with await Raw.to(network.address):
            await network.connections(1)
            await site.settle()
            with pytest.raises(BlockingIOError):
                server.listener.accept()
            network.thaw()
            with await server.taken():
                assert network.open == 1


async def test_the_open_ones_can_be_dead_while_newcomers_live(site: Site, network: Network) -> None:
    """The half-open connection of a client that changed networks."""
    async with aiohttp.ClientSession(f"http://{network.address}") as http, http.ws_connect("/ws") as old:
        network.freeze(newcomers=False)
        await old.send_str("into the void")
        async with http.ws_connect("/ws") as new:
            await new.send_str("hello")
            assert await new.receive_str() == "hello"
        assert site.heard == ["hello"]
        network.cut()


# ── refusing, delaying, splitting, idling ────────────────────────────────────────────────────────────


async def test_a_refused_connection_is_reset_at_once(site: Site, network: Network) -> None:
    """And the gateway never hears of it."""
    network.refuse()
    with await Raw.to(network.address) as client:
        assert await client.rest() == (b"", True)
    assert (network.refused, network.accepted, site.asked) == (1, 0, [])
    network.accept()
    async with aiohttp.ClientSession(f"http://{network.address}") as http:
        assert await long(http)


@pytest.mark.parametrize("upwards", [True, False])
async def test_what_is_delayed_comes_when_the_delay_ends(site: Site, *, upwards: bool) -> None:
    """A fault that ends must not last on in what it befell."""
    async with line() as (network, client, served):
        writer, reader = (client, served) if upwards else (served, client)
        network.delay_seconds = NEVER
        await writer.say(b"late")
        await site.settle()
        assert reader.hears_nothing()
        network.delay_seconds = 0.001
        await writer.say(b"r")
        assert await reader.hear(5) == b"later"


async def test_a_split_message_comes_in_pieces() -> None:
    """Frames that come torn are the rule in a browser."""
    pieces: list[int] = []
    async with line() as (network, client, served):
        network.split = 100
        await served.say(b"x" * 1000)
        while sum(pieces) < 1000:
            pieces.append(len(await asyncio.get_running_loop().sock_recv(client.end, 65_536)))
    assert len(pieces) > 5


async def test_a_silent_connection_is_closed_and_a_talking_one_is_not(
    network: Network, http: aiohttp.ClientSession
) -> None:
    """What a load balancer does to a stream without heartbeats."""
    async with http.ws_connect("/ws") as silent, http.ws_connect("/ws") as talking:
        network.idle_seconds = 0.5
        while not network.idle_cuts:
            await talking.send_str("hello")
            assert await talking.receive_str() == "hello"
        message = await silent.receive(WAIT_SECONDS)
        assert message.type is aiohttp.WSMsgType.CLOSED
        assert (network.idle_cuts, network.open, network.cuts) == (1, 1, 0)
        network.idle_seconds = None


async def test_a_frozen_connection_is_not_idle(site: Site) -> None:
    """The frost is the fault then; the clock begins again with the thaw."""
    async with line() as (network, client, served):
        network.freeze()
        network.idle_seconds = 0.05
        until = asyncio.get_running_loop().time() + 0.06
        while asyncio.get_running_loop().time() < until:
            await site.settle()
        network.thaw()
        assert network.open == 1
        assert await client.rest() == (b"", False)
        assert await served.rest() == (b"", False)
        assert network.idle_cuts == 1


# ── blocked upgrades ─────────────────────────────────────────────────────────────────────────────────


async def test_a_refused_upgrade_is_forbidden(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """As a corporate proxy does it; open sockets and other requests are left alone."""
    async with http.ws_connect("/ws") as before:
        network.block_upgrades = "refuse"
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await http.ws_connect("/ws")
        assert await long(http, b"a body")
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await http.ws_connect("/ws")  # on the connection that the last request kept alive
        await before.send_str("still open")
        assert await before.receive_str() == "still open"
        assert (network.upgrades_blocked, site.asked) == (2, ["/ws", "/long"])
    network.block_upgrades = None
    async with http.ws_connect("/ws") as after:
        await after.send_str("again")
        assert await after.receive_str() == "again"


async def test_a_refusal_is_whole_and_closes(network: Network) -> None:
    """A client that goes on talking must not lose the answer to a reset."""
    network.block_upgrades = "refuse"
    with await Raw.to(network.address) as client:
        await client.say(UPGRADE + b"x" * 1_000_000)
        heard, reset = await client.rest()
        assert heard.startswith(b"HTTP/1.1 403 ")
        assert heard.endswith(b"\r\n\r\nblocked\n")
        assert not reset


async def test_a_swallowed_upgrade_is_never_answered(site: Site, network: Network) -> None:
    """However its head was cut on the way; and nothing of it reaches the gateway."""
    network.block_upgrades = "swallow"
    with await Raw.to(network.address) as client:
        for number in range(len(UPGRADE)):
            await client.say(UPGRADE[number : number + 1])
        await network.until(lambda: network.upgrades_blocked == 1)
        await client.say(b"anybody?")
        await site.settle()
        assert (site.asked, client.hears_nothing(), network.open) == ([], True, 1)
        network.block_upgrades = None
        await site.settle()
        assert client.hears_nothing()
    await network.connections(0)


async def test_a_swallowed_upgrade_leaves_the_gateway_alone() -> None:
    """Nobody is there for it to answer."""
    async with line() as (network, client, served):
        network.block_upgrades = "swallow"
        await client.say(UPGRADE)
        assert await served.rest() == (b"", False)
        assert (client.hears_nothing(), network.open) == (True, 1)


async def test_a_head_is_held_back_until_it_is_known(site: Site) -> None:
    """Half a head could still become an upgrade; it passes when nothing is blocked any more."""
    async with line() as (network, client, served):
        network.block_upgrades = "refuse"
        await client.say(UPGRADE[:20])
        await network.until(lambda: network.bytes_up == 20)
        await site.settle()
        assert served.hears_nothing()
        network.block_upgrades = None
        assert await served.hear(20) == UPGRADE[:20]


# ── buffered streams ─────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_is_held_back_until_it_ends(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """Head and all; other answers pass meanwhile, before and after, on the same connection too."""
    network.buffer_streams = True
    assert await long(http)
    getting = asyncio.create_task(http.get("/events"))
    await network.until(lambda: network.streams_held == 1)
    assert await long(http)
    await site.settle()
    assert not getting.done()
    site.go_on.set()
    async with await getting as answer:
        assert await answer.read() == EVENTS
    assert await long(http)
    async with http.get("/chunked") as answer:
        assert len(await answer.read()) == 3000
    assert (network.accepted, network.streams_held) == (2, 1)


async def test_a_stream_that_is_held_back_passes_when_nothing_is(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """A fault that ends must not last on in what it befell."""
    network.buffer_streams = True
    getting = asyncio.create_task(http.get("/events"))
    await network.until(lambda: network.streams_held == 1)
    network.buffer_streams = False
    async with await getting as answer:
        assert await answer.content.readexactly(11) == EVENTS[:11]
        site.go_on.set()
        assert await answer.read() == EVENTS[11:]


async def test_a_held_stream_without_a_length_ends_with_its_connection() -> None:
    """HTTP/1.0 and `Connection: close`."""
    said = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENTS
    async with line() as (network, client, served):
        network.buffer_streams = True
        await client.say(b"GET / HTTP/1.1\r\n\r\n")
        assert len(await served.hear(18)) == 18
        await served.say(said)
        await network.until(lambda: network.bytes_down == len(said))
        assert client.hears_nothing()
        served.end.shutdown(socket.SHUT_WR)
        assert await client.hear(len(said) + 1) == said


# ── the HTTP in it ───────────────────────────────────────────────────────────────────────────────────

MESSAGES = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length:  5 \r\n\r\nab\r\n\n",
    b"PUT / HTTP/1.1\nTransfer-Encoding: chunked\n\n5;x\n0\r\n\r\n\r\nA\r\n0123456789\r\n0\r\nb:\r\n\r\n",
    b"\r\nPOST / HTTP/1.1\nContent-Length: 0\n\n",
]


@given(
    messages=st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 40), max_size=20),
)
def test_messages_are_found_wherever_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    """Each ends where it ends, and no byte is lost or changed."""
    framing = Framing(lambda head: head.body(unsaid=0))
    said, ends, heads = b"".join(messages), [], 0
    seen = b""
    left = said
    while left:
        size = cuts.pop() if cuts else len(left)
        for piece, mark in framing.feed(left[:size]):
            seen += piece
            heads += Mark.HEAD in mark
            if Mark.MESSAGE in mark:
                ends.append(len(seen))
        left = left[size:]
    assert seen == said
    assert ends == [len(b"".join(messages[: count + 1])) for count in range(len(messages))]
    assert heads == len(messages)


@pytest.mark.parametrize(
    "odd",
    [
        b"\x16\x03\x01 no HTTP\n\n",
        b"SSH-2.0-x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * HEAD_BYTES,
    ],
)
def test_what_is_no_http_is_let_be(odd: bytes) -> None:
    """From there on no head is seen."""
    framing = Framing(lambda head: head.body(unsaid=0))
    list(framing.feed(odd))
    assert list(framing.feed(MESSAGES[0])) == [(MESSAGES[0], Mark.NOTHING)]


async def test_answers_without_a_body_do_not_hide_the_next() -> None:
    """`HEAD`, `204`, `304` and `100` have lengths that nothing follows."""
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\n"
    answers = [
        (b"HEAD", stream),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n"),
        (b"POST", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    ]
    async with line() as (network, client, served):
        network.buffer_streams = True
        for method, answer in answers:
            await client.say(method + b" / HTTP/1.1\r\n\r\n")
            await served.hear(len(method) + 15)
            await served.say(answer)
            assert await client.hear(len(answer)) == answer
        await client.say(b"GET / HTTP/1.1\r\n\r\n")
        await served.hear(18)
        await served.say(stream)
        await network.until(lambda: network.streams_held == 2)
        assert client.hears_nothing()
        await served.say(b"data: x\n\n")
        assert await client.hear(len(stream) + 9) == stream + b"data: x\n\n"


def test_a_head_is_read_without_regard_to_case() -> None:
    """Browsers, proxies and servers differ."""
    head = Head([b"GET / HTTP/1.1", b"UPGRADE: WebSocket"])
    assert head.is_upgrade
    assert Head([b"HTTP/1.1 200 OK", b"content-TYPE: Text/Event-Stream;charset=utf-8"]).is_stream


# ── weather ──────────────────────────────────────────────────────────────────────────────────────────


def forecast(seed: int, count: int = 50) -> list[Fault]:
    kinds: tuple[Kind, ...] = get_args(Kind)
    return list(islice(_forecast(random.Random(seed), (0.001, 0.01), (0.001, 0.02), kinds), count))


def controls(network: Network) -> dict[str, object]:
    return {
        name: getattr(network, name)
        for name in ("delay_seconds", "split", "block_upgrades", "buffer_streams", "_refuses", "_frost")
    }


async def stormy(network: Network, seed: int, faults: int, kinds: tuple[Kind, ...] = get_args(Kind)) -> None:
    network.weather(
        seed, pauses=(0.001, 0.01), lengths=(0.001, 0.02), longest_delay_seconds=0.005, kinds=kinds
    )
    await network.until(lambda: len(network.faults) >= faults)


async def test_the_same_seed_is_the_same_weather(network: Network) -> None:
    """A schedule that failed is run again, by its number."""
    await stormy(network, 5, 20)
    await network.calm()
    assert network.faults[:20] == forecast(5, 20)
    assert forecast(5) != forecast(6)
    assert {fault.kind for fault in forecast(5, 200)} == set(get_args(Kind))


async def test_every_visitor_gets_through_the_weather(network: Network) -> None:
    """It is bad, and never for ever; what does get through is right."""
    was = controls(network)
    right: list[bool] = []

    async def visit(number: int) -> None:
        async with aiohttp.ClientSession(
            f"http://{network.address}", timeout=aiohttp.ClientTimeout(0.5)
        ) as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with http.ws_connect("/ws") as echo:
                        await echo.send_str(f"visitor {number}")
                        if (message := await echo.receive()).type is aiohttp.WSMsgType.TEXT:
                            right.append(message.data == f"visitor {number}")
                            return

    await stormy(network, 11, 10)
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(*(visit(number) for number in range(20)))
    await network.until(lambda: len(network.faults) >= 60)
    await network.calm()
    assert right == [True] * 20
    assert controls(network) == was
    async with aiohttp.ClientSession(f"http://{network.address}") as http:
        assert await long(http)


@pytest.mark.parametrize("kind", get_args(Kind))
async def test_each_fault_ends(kind: Kind, network: Network) -> None:
    """In its midst as well: what a test had set is so again, and the network carries."""
    network.delay_seconds, network.split, network.block_upgrades = 0.0001, 500, "refuse"
    was = controls(network)
    await stormy(network, 3, 3, (kind,))
    await network.calm()
    await network.calm()
    assert controls(network) == was
    assert {fault.kind for fault in network.faults} == {kind}
    network.block_upgrades = network.split = None
    async with aiohttp.ClientSession(f"http://{network.address}") as http:
        assert await long(http)


async def test_a_torn_connection_breaks_in_what_comes_next(site: Site) -> None:
    """After some of it, or at the end of the fault."""
    async with line() as (network, client, served):
        network.weather(1, pauses=(0.0, 0.0), lengths=(NEVER, NEVER), kinds=("tear",))
        await network.until(lambda: len(network.faults) == 1)
        with contextlib.suppress(ConnectionError):
            await served.say(b"x" * 1000)
        heard, reset = await client.rest()
        assert (0 < len(heard) < 500, reset) == (True, True)
        await site.settle()
    assert network.cuts == 1


@pytest.mark.parametrize("kind", ["swallow-upgrades", "tear"])
async def test_what_the_weather_spoilt_does_not_last(kind: Kind, network: Network) -> None:
    """A page without a deadline of its own would wait for ever."""
    with await Raw.to(network.address) as client:
        if kind == "tear":
            await client.say(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await client.hear(12) == b"HTTP/1.1 200"
        network.weather(1, pauses=(0.0, 0.0), lengths=(NEVER, NEVER), kinds=(kind,))
        await network.until(lambda: len(network.faults) == 1)
        if kind == "swallow-upgrades":
            with await Raw.to(network.address) as swallowed:
                await swallowed.say(UPGRADE)
                await network.until(lambda: network.upgrades_blocked == 1)
                await network.calm()
                assert await swallowed.rest() == (b"", True)
        await network.calm()
        assert (await client.rest())[1]


async def test_who_is_left_at_its_end_is_reset() -> None:
    """No client of a test waits for a network that is gone."""
    async with Server() as server:
        async with Network(server.address) as network:
            client = await Raw.to(network.address)
            served = await server.taken()
        with client, served:
            assert await client.rest() == await served.rest() == (b"", True)
        assert network.open == 0
