"""A gateway that was stopped, or killed, and started again on its own store."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from tests.support.backend import Exchange, ScriptedBackend
from tests.support.client import SessionClient
from tests.support.process import GatewayProcess
from tests.support.wires import HttpChat, eventually

if TYPE_CHECKING:
    from pathlib import Path


async def until_released(exchange: Exchange) -> None:
    """Ends at once, unless it is asked to hold."""
    await exchange.head()
    await exchange.text("one", finish=False)
    if exchange.json["messages"][0]["parts"][0]["text"] == "hold":
        await exchange.release.wait()
    await exchange.text("two", start=False)


async def test_a_restart_and_a_kill_lose_nothing_that_was_seen(tmp_path: Path) -> None:
    """Finished turns are readable at the same offsets; what was cut off says so; new sends work."""
    settings = {"data_dir": tmp_path / "data", "lease": 0.5, "drain": 0.1}
    async with ScriptedBackend(until_released) as backend:
        settings["upstream"] = backend.url
        async with GatewayProcess(**settings) as first:
            await first.started()
            async with SessionClient(first.address) as client:
                await client.send("s", "t1")
                await client.ended("t1")
                await client.send("s", "t2", "hold")
                await client.wait(lambda line: line.get("turn") == "t2" and line["type"] == "chunk", count=4)
                first.terminate()
                end = await client.ended("t2")
                assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost")
                assert await client.closed() == 4000
                seen = client.records
            assert await first.exited() == 0
            assert (await backend.exchange(1)).was_closed.is_set()
        async with GatewayProcess(**settings) as second:
            await second.started()
            async with SessionClient(second.address) as client:
                reply = await client.attach("s", seen[4]["cursor"])
                assert "resync" not in reply
                await client.ended("t2")
                assert client.records == seen[5:]
                await client.send("s", "t3", "hold")
                await client.wait(lambda line: line.get("turn") == "t3" and line["type"] == "chunk", count=4)
                seen += client.records[len(seen) - 5 :]
                await second.kill()
        async with GatewayProcess(**settings) as third:
            await third.started()
            async with SessionClient(third.address) as client:
                reply = await client.attach("s")
                assert "resync" not in reply
                end = await client.ended("t3")
                assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost")
                assert client.records[: len(seen)] == seen
                assert client.offsets == list(range(1, len(seen) + 2))
                await client.send("s", "t4")
                assert (await client.ended("t4"))["reason"] == "complete"
                assert (await client.send("s", "t1"))["duplicate"]
        assert len(backend.exchanges) == 4


async def test_a_stopping_gateway_lets_its_turns_end(tmp_path: Path) -> None:
    """A deploy ends no answer (G5); it takes no new sends; a second signal ends the wait."""
    async with ScriptedBackend(until_released) as backend:
        settings = {"data_dir": tmp_path / "data", "upstream": backend.url}
        async with GatewayProcess(**settings) as gateway:
            await gateway.started()
            async with SessionClient(gateway.address) as client, HttpChat(gateway.address) as http:
                await client.send("s", "t1", "hold")
                await client.wait(lambda line: line["type"] == "chunk", count=4)
                gateway.terminate()
                await gateway.said("node.draining")
                refused = await client.send("s", "t2")
                assert (refused["code"], refused["retryable"]) == ("draining", True)
                assert (await http.request("GET", f"http://{gateway.admin_address}/readyz")).status == 503
                assert (await http.request("GET", f"http://{gateway.admin_address}/healthz")).status == 200
                answer = await http.post("s")
                assert answer.status == 503
                assert "Retry-After" in answer.headers
                (await backend.exchange()).release.set()
                assert (await client.ended("t1"))["reason"] == "complete"
                assert await client.closed() == 4000
            assert await gateway.exited() == 0
        async with GatewayProcess(**settings) as gateway:
            await gateway.started()
            async with SessionClient(gateway.address) as client:
                await client.send("s", "t3", "hold")
                await client.wait(lambda line: line["type"] == "chunk", count=4)
                gateway.terminate()
                await gateway.said("node.draining")
                gateway.terminate()
                assert (await client.ended("t3"))["reason"] == "interrupted"
            assert await gateway.exited() == 0


async def test_a_signal_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    """A deploy that changes its mind must not leave a Valkey that stops the next start."""
    data = tmp_path / "data"
    settings = {"data_dir": data, "upstream": "http://127.0.0.1:1"}
    async with GatewayProcess(**settings) as gateway:
        await eventually(data.exists)
        gateway.terminate()
        assert await gateway.exited() == 0
        assert "Traceback" not in gateway.text
    async with GatewayProcess(**settings) as gateway:
        await gateway.started()
        gateway.terminate()
        assert await gateway.exited() == 0


async def test_two_gateways_do_not_share_a_data_directory(tmp_path: Path) -> None:
    """The second says so and goes; the first does not notice."""
    settings = {"data_dir": tmp_path / "data", "upstream": "http://127.0.0.1:1"}
    async with GatewayProcess(**settings) as first, GatewayProcess(**settings) as second:
        ends = asyncio.create_task(second.exited()), asyncio.create_task(first.exited())
        done, waiting = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert len(done) == 1
        assert done.pop().result() == 1
        loser, winner = (second, first) if second.process.returncode is not None else (first, second)
        assert loser.text.startswith("unable to ")
        assert str(tmp_path / "data") in loser.text
        assert "Traceback" not in loser.text
        await winner.started()
        async with SessionClient(winner.address) as client:
            assert (await client.ask(type="ping"))["type"] == "pong"
        winner.terminate()
        assert await waiting.pop() == 0


async def test_bad_settings_are_told_all_at_once(tmp_path: Path) -> None:
    """Nobody should have to start a container five times."""
    wrong = {
        "listen": "0.0.0.0:0",
        "chat_path": "api",
        "heartbeat": "-1",
        "abort": "maybe",
        "data_dir": tmp_path,
    }
    async with GatewayProcess(**wrong) as gateway:
        assert await gateway.exited() == 2
        for name in ("UPSTREAM", "LISTEN", "CHAT_PATH", "HEARTBEAT", "ABORT", "AUTH"):
            assert f"GATEWAY_{name}" in gateway.text
        assert "Traceback" not in gateway.text


async def test_a_port_that_is_taken_is_a_clear_error(tmp_path: Path) -> None:
    """And it leaves no store behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = {"data_dir": tmp_path / "data", "upstream": "http://127.0.0.1:1"}
        for name in ("listen", "admin_listen"):
            async with GatewayProcess(**settings, **{name: address}) as gateway:
                assert await gateway.exited() == 1
                assert f"unable to listen on {address}" in gateway.text
                assert "Traceback" not in gateway.text


async def test_being_open_to_all_is_said_in_the_log(tmp_path: Path) -> None:
    """Beyond loopback nothing is served until somebody said who may; and ``none`` says what it means."""
    settings = {"data_dir": tmp_path / "data", "upstream": "http://127.0.0.1:1", "listen": "0.0.0.0:0"}
    async with GatewayProcess(**settings) as gateway:
        assert await gateway.exited() == 2
        assert "GATEWAY_AUTH" in gateway.text
    async with GatewayProcess(**settings, auth="none") as gateway:
        await gateway.started()
        told = await gateway.said("auth.none")
        assert told["level"] == "warning"
        assert "whoever reaches" in told["meaning"]
        gateway.terminate()
        assert await gateway.exited() == 0


async def test_help_lists_every_setting() -> None:
    """The environment is the interface."""
    async with GatewayProcess("--help") as gateway:
        assert await gateway.exited() == 0
        for name in ("GATEWAY_UPSTREAM", "GATEWAY_LISTEN", "GATEWAY_MAX_LAG", "GATEWAY_AUTH"):
            assert name in gateway.stdout
    async with GatewayProcess("dance") as gateway:
        assert await gateway.exited() == 2
        assert "invalid choice" in gateway.text
