"""A deploy as operators do it: three nodes are replaced one after another, and nobody may notice."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from gateway.client import GatewayClient, Timing
from tests.support.backend import Exchange, ScriptedBackend
from tests.support.balancer import Balancer
from tests.support.client import send_body
from tests.support.process import GatewayProcess
from tests.support.wires import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from gateway.client import Record

pytestmark = pytest.mark.timeout(240)

NODES = 3
SESSIONS = 50
READERS = 4
"""Clients of each session; the first of them sends."""
HELD, MEANWHILE = KINDS = ("held", "asked-meanwhile")
"""Turns that run when a node is told to stop, and those that are asked for right then."""
SECONDS = 60.0
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/bin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; a node that is replaced comes back on its own."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.asynccontextmanager
async def nginx(nodes: Sequence[str], folder: Path) -> AsyncIterator[str]:
    """An nginx in front of the nodes, as most have one; gives its address."""
    assert NGINX is not None
    (port,) = free_ports(1)
    servers = "\n".join(f"server {node} max_fails=0;" for node in nodes)
    (folder / "nginx.conf").write_text(f"""
        daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
        events {{ worker_connections 4096; }}
        http {{
          access_log off;
          client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
          fastcgi_temp_path {folder}/fcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
          upstream gateway {{ {servers} keepalive 32; }}
          map $http_upgrade $gateway_connection {{ default upgrade; "" ""; }}
          server {{
            listen 127.0.0.1:{port} backlog=1024;
            location / {{
              proxy_pass http://gateway;
              proxy_http_version 1.1;
              proxy_set_header Host $http_host;
              proxy_set_header Upgrade $http_upgrade;
              proxy_set_header Connection $gateway_connection;
              proxy_next_upstream error timeout http_503;
              proxy_buffering off;
            }}
          }}
        }}
    """)
    process = await asyncio.create_subprocess_exec(NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"))

    async def listens() -> bool:
        assert process.returncode is None, "unable to run nginx; see what it said"
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.transport.abort()
            return True
        return False

    try:
        await eventually(listens)
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def nothing(nodes: Sequence[str], _: Path) -> AsyncIterator[str]:
    """Connections are passed on, and nothing is known of HTTP."""
    async with Balancer(nodes) as balancer:
        yield balancer.address


@dataclass
class Reader:
    """One client, attached to one session as long as the test lasts."""

    session: str
    gateway: GatewayClient
    records: list[Record] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        """Until it is cancelled. Whatever is raised is the test's failure."""
        async with self.gateway.attach(self.session) as records:
            async for record in records:
                self.records.append(record)
                self.changed.set()

    def texts(self) -> dict[str, str]:
        """What each turn said."""
        said: dict[str, str] = {}
        for record in self.records:
            data: Any = record.data
            if record.kind == "chunk" and data["type"] == "text-delta":
                said[record.turn] = said.get(record.turn, "") + data["delta"]
        return said

    def has_ended(self, turn: str) -> bool:
        return any(record.kind == "turn-end" and record.turn == turn for record in reversed(self.records))


class Deploy:
    """Three nodes, what is in front of them, and 200 clients.

    Args:
        stack: What it opens is closed with it.
        upstream: The backend.
        redis_url: One store for all nodes.
    """

    def __init__(self, stack: contextlib.AsyncExitStack, upstream: str, redis_url: str) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(NODES)]
        self.nodes: list[GatewayProcess] = []
        self.readers: list[Reader] = []
        self._stack = stack
        self._settings: dict[str, object] = {
            "upstream": upstream, "redis_url": redis_url, "key_prefix": f"t{secrets.token_hex(4)}",
            "lease": 2, "goaway_spread": 1, "drain": SECONDS,
        }  # fmt: skip

    async def start(self, number: int) -> None:
        """Start a node on its address."""
        node = GatewayProcess(**{**self._settings, "listen": self.addresses[number]})
        self.nodes.append(await self._stack.enter_async_context(node))
        await node.started()

    async def connect(self, address: str) -> None:
        """All clients; each connects when it has something to ask."""
        for number in range(SESSIONS * READERS):
            client = GatewayClient(f"http://{address}", timing=Timing(give_up_seconds=SECONDS))
            await self._stack.enter_async_context(client)
            self.readers.append(Reader(f"s{number // READERS}", client))

    async def ask(self, stage: int, kind: str) -> None:
        """One client of each session asks; none may be refused."""
        async with asyncio.TaskGroup() as group:
            for reader in self.readers[::READERS]:
                body = send_body("x", stage=stage, kind=kind)
                group.create_task(reader.gateway.send(reader.session, body, turn=f"{kind}-{stage}"))

    async def replace(self, stage: int, held: asyncio.Event) -> None:
        """Stop a node in the middle of all turns, ask once more, and start another in its place."""
        await self.ask(stage, HELD)
        await self.each(lambda reader: f"{HELD}-{stage}" in reader.texts())
        node = self.nodes[stage]
        node.terminate()
        await self.ask(stage, MEANWHILE)
        await node.said("node.departing")
        held.set()
        await self.each(lambda reader: all(reader.has_ended(f"{kind}-{stage}") for kind in KINDS))
        assert await node.exited() == 0
        await self.start(stage)

    async def each(self, holds: Callable[[Reader], bool]) -> None:
        """Wait until it holds of every reader."""
        async with asyncio.timeout(SECONDS):
            for reader in self.readers:
                while not holds(reader):
                    reader.changed.clear()
                    await reader.changed.wait()


@pytest.mark.parametrize(
    "in_front",
    [
        nothing,
        pytest.param(nginx, marks=pytest.mark.skipif(NGINX is None, reason="unable to find nginx")),
    ],
)
async def test_nobody_notices_that_every_node_is_replaced(
    in_front: Any, valkey_url: str, tmp_path: Path
) -> None:
    """200 clients and 50 running turns: each client has each answer whole and once, and none an error."""
    held = [asyncio.Event() for _ in range(NODES)]

    async def script(exchange: Exchange) -> None:
        stage, kind = exchange.json["stage"], exchange.json["kind"]
        await exchange.head()
        await exchange.text(f"{kind} {stage} begins,", finish=False)
        if kind == HELD:
            await held[stage].wait()
        await exchange.text("ends", start=False)

    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(ScriptedBackend(script))
        deploy = Deploy(stack, backend.url, valkey_url)
        for number in range(NODES):
            await deploy.start(number)
        await deploy.connect(await stack.enter_async_context(in_front(deploy.addresses, tmp_path)))
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(reader.read()) for reader in deploy.readers]
            for stage in range(NODES):
                await deploy.replace(stage, held[stage])
            for task in reading:
                task.cancel()
        said = {f"{kind}-{stage}": f"{kind} {stage} begins,ends" for kind in KINDS for stage in range(NODES)}
        for reader in deploy.readers:
            assert reader.texts() == said
            assert [record.offset for record in reader.records] == list(range(1, len(reader.records) + 1))
            assert {record.reason for record in reader.records} == {None, "complete"}
        assert len(backend.exchanges) == len(said) * SESSIONS
        for node in deploy.nodes:
            assert not [line for line in node.log if line.get("level") == "error" or "text" in line]
