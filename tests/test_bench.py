"""The bench: it works, and it calls a run with a loss an error."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.answers import Answer, BenchError, Meter
from bench.blocking import Block, Proxy
from bench.measure import GATEWAY, Results, measure
from bench.measure_client import Reader
from bench.node import NodeProgram, has_client
from bench.plan import SMOKE
from bench.report import NO_CLIENT, report
from bench.rig import System, has_nginx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

ALL = [system for system in System if system is not System.NGINX or has_nginx()]

needs_client = pytest.mark.skipif(not has_client(), reason="there is no Node, or the client is not built")


@pytest.fixture(scope="module")
def results() -> Results:
    """The figures of the shortest run."""
    return measure(SMOKE, lambda _: None)


def test_every_system_gets_its_row_and_no_chunk_is_lost(results: Results) -> None:
    """The figures of the README come out of this command; the shortest run of it must hold together."""
    for load in (results.steady, results.many, results.burst):
        assert list(load) == ALL
        assert all(row.rate > 0 for row in load.values())
    assert list(results.resume) == list(GATEWAY)
    assert set(results.cancel) == {System.GATEWAY_HTTP, System.GATEWAY_SESSION}
    assert set(results.idle) == {System.GATEWAY_SDK, System.GATEWAY_SESSION}
    lines = report(results, "test").splitlines()
    assert [sum(line.startswith(f"| {system} |") for line in lines) for system in GATEWAY] == [4, 3, 4]


@needs_client
def test_the_client_gets_its_rows_on_every_carrier_and_network(results: Results) -> None:
    """They were measured on the carrier that each network leaves, or the run would have been an error."""
    assert results.client is not None
    assert list(results.client.steady) == [reader for reader in Reader if reader.system in ALL]
    assert set(results.client.reconnect) == {reader.carrier for reader in Reader} - {None}
    # Each came of polls, and no other carrier asks for anything while chunks flow.
    polling = {reader for reader, row in results.client.steady.items() if row.requests}
    assert polling == {Reader.LONG_POLL}
    lines = report(results, "test").splitlines()
    named = [line.partition(" | ")[0].strip("|* ") for line in lines]
    rows = [*results.client.steady, *Block]
    assert [named.count(row) for row in rows] == [1] * len(rows)
    assert NO_CLIENT not in lines


def test_a_machine_without_node_is_told_what_was_left_out(results: Results) -> None:
    """A table that is silently not there would be taken for one that never was."""
    lines = report(replace(results, client=None), "test").splitlines()

    assert NO_CLIENT in lines
    assert not [line for line in lines if "client, " in line]


@pytest.mark.parametrize(
    "indexes",
    [(0, 2, 3), (0, 1, 1, 2, 3), (1, 0, 2, 3), (0, 1, 2)],
    ids=["lost", "twice", "swapped", "cut off"],
)
async def test_a_run_with_a_loss_is_no_figure(indexes: Sequence[int]) -> None:
    """A fast gateway that loses chunks would otherwise look best of all."""
    answer = Answer(4, Meter())

    answer.take(b"".join(b'"delta":"%08d.%020d"' % (index, 1) for index in indexes), now=2)
    answer.finish(now=3)

    with pytest.raises(BenchError):
        await answer.ended


async def test_a_whole_answer_is_measured_in_the_window_alone() -> None:
    """What comes before the window opens has the start of the turns in it."""
    meter = Meter()
    answer = Answer(2, meter)

    answer.take(b'"delta":"00000000.00000000000000000005"', now=105)
    meter.is_open = True
    answer.take(b'"delta":"00000001.00000000000000000010"', now=17)
    answer.finish(now=20)

    assert await answer.ended == 20
    assert meter.latencies == [7]


@asynccontextmanager
async def _answering(answer: bytes) -> AsyncIterator[int]:
    """A server that says the same to everyone, and closes; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.write_eof()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def _stream_of(indexes: Sequence[int]) -> bytes:
    deltas = [b'data: {"type":"text-delta","id":"t1","delta":"%08d.%020d"}\n\n' % (one, 1) for one in indexes]
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b"".join(deltas)


@needs_client
async def test_what_the_clients_process_read_is_counted() -> None:
    """It is compared with what the backend has written, by which an answer that was cut off is found."""
    async with _answering(_stream_of([0, 1, 2])) as port, NodeProgram() as program:
        await program.ask("start", carrier=None, port=port, turns=2, order={})

        assert await program.ask("ended") == {"received": 6}


@needs_client
@pytest.mark.parametrize("indexes", [(0, 2), (0, 0, 1), (1, 0)], ids=["lost", "twice", "swapped"])
async def test_a_loss_in_the_clients_process_is_no_figure(indexes: Sequence[int]) -> None:
    """The client is measured under the same law as the gateway."""
    async with _answering(_stream_of(indexes)) as port, NodeProgram() as program:
        await program.ask("start", carrier=None, port=port, turns=1, order={})

        with pytest.raises(BenchError, match="was due"):
            await program.ask("ended")


@pytest.mark.parametrize(
    ("block", "answer"),
    [(Block.REFUSED, b"HTTP/1.1 403 "), (Block.SWALLOWED, b""), (Block.HELD, b"")],
)
async def test_an_upgrade_is_refused_or_never_answered(block: Block, answer: bytes) -> None:
    """What a client does about each takes it a different time, and the carrier is the same in the end."""
    through = _answering(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    async with asyncio.timeout(10), through as port, Proxy(port, block) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET /gateway/v1/ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        writer.write_eof()

        assert (await reader.read())[:13] == answer
        writer.close()


async def test_a_cut_resets_what_is_open_on_both_sides() -> None:
    """A connection that merely closed might pass for an answer that ended."""
    asked = asyncio.Event()
    told: asyncio.Future[bytes | BaseException] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        told.set_result((await asyncio.gather(reader.read(), return_exceptions=True))[0])
        writer.close()

    async with (
        asyncio.timeout(10),
        await asyncio.start_server(serve, "127.0.0.1", 0) as server,
        Proxy(server.sockets[0].getsockname()[1]) as proxy,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await asked.wait()
        proxy.cut()

        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert isinstance(await told, ConnectionResetError)
        writer.close()
