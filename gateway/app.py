"""Wiring: one gateway node from its settings, its listeners, its health and its end."""

from __future__ import annotations

import asyncio
import gc
import resource
import secrets
import signal
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

import structlog
from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway import doorbell, journal, lease, telemetry
from gateway.config import AuthMode, Config
from gateway.core.model import GatewayError, NodeId, SessionId
from gateway.doorbell import Doorbell
from gateway.edge.admission import OpenConnections
from gateway.edge.chat import ChatWire
from gateway.edge.chatpaths import ChatEndpoint, ChatPaths
from gateway.edge.clientmodule import ClientModule
from gateway.edge.commandpost import CommandPost
from gateway.edge.commands import Commands
from gateway.edge.departure import Departure
from gateway.edge.endpoints import PREFIX, Endpoints, not_found
from gateway.edge.fallback import Fallback
from gateway.edge.listener import Listener, ListenError
from gateway.edge.origin import OriginPolicy, cors_signal, origin_middleware
from gateway.edge.proxy import Proxy, remove_added_headers
from gateway.edge.requests import BodyReader
from gateway.edge.sdksocket import SdkWire
from gateway.edge.socket import SessionWire
from gateway.embedded import EmbeddedValkey
from gateway.hub import Hub
from gateway.journal import SessionJournal
from gateway.lease import Lease
from gateway.repairs import Repairs
from gateway.sessions import Sessions
from gateway.store import Store, StoreError, StoreUnavailable
from gateway.turns import RunningTurns
from gateway.upstream import UpstreamClient, make_client_session

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["ListenError", "Node", "StartError", "serve"]

log = structlog.get_logger(__name__)

READY_SECONDS = 2.0
GC_THRESHOLDS = (10_000, 20, 20)
"""Most of what a node holds lives as long as a client is attached. Looking through all of it again and again
cost half a second at a time with 5,000 clients (measured in bench/, where they all come at once)."""

END_SECONDS = 5.0
"""How long a task may take to end when it is told to; Python 3.11 loses some cancellations."""

PROBES = 32
"""Sessions looked for at the start: a server that has but a part of a cluster's slots refuses one of them."""

OWN_DESCRIPTORS = 100
"""For files, listeners, the store, operators and who is just being refused; beside those of connections."""


class StartError(GatewayError):
    """The store cannot be used."""


class Node:
    """One gateway process: an async context manager that listens while it is open.

    Args:
        config: All settings.

    Attributes:
        address: ``host:port`` where clients connect, once it is open.
        admin_address: The same for operators.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.id = NodeId(secrets.token_hex(6))
        self.address = ""
        self.admin_address = ""
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves with the reason when the node cannot go on."""
        self._hurry = asyncio.Event()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _open(self, stack: AsyncExitStack) -> None:
        config = self.config
        self._store = await stack.enter_async_context(
            Store(await self._store_url(stack), (*journal.SCRIPTS, *lease.SCRIPTS, *doorbell.SCRIPTS))
        )
        session_journal = SessionJournal(
            self._store,
            node=self.id,
            prefix=config.key_prefix,
            ttl_seconds=config.session_ttl_seconds,
            window_seconds=config.resume_window_seconds,
        )
        self._lease = Lease(
            self._store, node=self.id, prefix=config.key_prefix, lease_seconds=config.lease_seconds
        )
        client = await stack.enter_async_context(make_client_session())
        bell = Doorbell(self._store, prefix=config.key_prefix, node=self.id)
        repairs = Repairs(session_journal, wait_seconds=config.lease_seconds / 2)
        stack.push_async_callback(repairs.close)
        hub = Hub(
            session_journal,
            doorbell=bell,
            repairs=repairs,
            max_lag_bytes=config.max_lag_bytes,
            poll_seconds=config.poll_seconds,
        )
        stack.push_async_callback(hub.close)
        upstream = UpstreamClient(config, client)
        turns = self._turns = RunningTurns(
            config,
            journal=session_journal,
            hub=hub,
            lease=self._lease,
            doorbell=bell,
            repairs=repairs,
            upstream=upstream,
        )
        stack.push_async_callback(self._turns.close)
        self._sessions = Sessions(
            config,
            journal=session_journal,
            hub=hub,
            lease=self._lease,
            repairs=repairs,
            turns=self._turns,
            upstream=upstream,
        )

        def missed(session: SessionId) -> None:
            hub.missed(session)
            turns.verify(session)

        bell.on_records, bell.on_turn, bell.on_missed = hub.rung, turns.rung, missed
        repairs.verify, repairs.renewed = turns.verify, hub.missed
        self._store.on_reconnect += [turns.verify, hub.missed_all]
        await self._check_store(session_journal)
        self._keep(stack, self._lease.run(self._sessions.seal, turns.beat), "lease")
        self._keep(stack, bell.run(), "doorbell")
        self._keep(stack, hub.run(), "hub")
        operators = Listener(self._admin_app())
        stack.push_async_callback(operators.close)
        self.admin_address = await operators.open(config.admin_address, "GATEWAY_ADMIN_LISTEN")
        connections = OpenConnections(config.max_connections)
        clients = Listener(self._client_app(Proxy(config, client), connections))
        stack.push_async_callback(clients.close)
        self.address = await clients.open(config.listen_address, "GATEWAY_LISTEN")
        self._departure = Departure(config, connections, clients)
        log.info("node.started", node=self.id, listen=self.address, admin=self.admin_address)
        if config.auth is AuthMode.NONE:
            log.warning(
                "auth.none",
                meaning="whoever reaches this gateway may read and write any session whose name they know",
            )

    async def stop(self) -> None:
        """Take no more sends, let the turns end (GATEWAY_DRAIN), close every socket, leave.

        Clients are sent to the other nodes meanwhile, if there are any; else nobody but this one serves them.
        """
        if not self._sessions.draining:
            self._sessions.drain()
            leaving = None
            # The gateway's own Valkey has no other node: who seems to live there is this one, killed.
            if self.config.redis_url is not None and self._lease.others_live:
                leaving = asyncio.create_task(self._departure.run(self._hurry), name="departure")
            await self._turns.drain(self._hurry)
            if leaving is not None:
                await leaving
        await self._stack.aclose()
        log.info("node.stopped", node=self.id)

    def hurry(self) -> None:
        """There is no time to drain."""
        self._hurry.set()

    # -- the store

    async def _check_store(self, sessions: SessionJournal) -> None:
        """Better to say it now, to who has just set it up, than to each client.

        Raises:
            StartError: It is of no use as it is.
        """
        try:
            await self._lease.check()
            if not self._store.is_sharded:
                await asyncio.gather(*(sessions.look(SessionId(f"probe-{n}")) for n in range(PROBES)))
        except (StoreUnavailable, StoreError) as error:
            embedded = self.config.redis_url is None
            where = "the gateway's own Valkey" if embedded else "the store of GATEWAY_REDIS_URL"
            raise StartError(f"unable to use {where}; {error.reason or error}") from error

    async def _store_url(self, stack: AsyncExitStack) -> str:
        config = self.config
        if config.redis_url is not None:
            return config.redis_url
        valkey = await stack.enter_async_context(
            EmbeddedValkey(config.data_dir, max_memory_bytes=config.embedded_max_memory_bytes)
        )
        self._keep(stack, self._watch(valkey), "watch-valkey")
        return valkey.url

    async def _watch(self, valkey: EmbeddedValkey) -> None:
        status = await valkey.wait_exit()
        if not self.failed.done():
            self.failed.set_result(f"the gateway's own Valkey ended with status {status}")

    # -- what listens

    def _client_app(self, proxy: Proxy, connections: OpenConnections) -> web.Application:
        config = self.config
        paths = ChatPaths(config.chat_paths)
        bodies = BodyReader(config)
        chat = ChatWire(config, sessions=self._sessions, proxy=proxy, bodies=bodies, connections=connections)
        sdk = SdkWire(config, sessions=self._sessions, connections=connections)
        commands = Commands(config, sessions=self._sessions, paths=paths)
        session = SessionWire(
            config, sessions=self._sessions, commands=commands, node=self.id, connections=connections
        )
        fallback = Fallback(config, self._sessions, connections)
        endpoints = Endpoints(
            socket=session,
            fallback=fallback,
            commands=CommandPost(commands, bodies),
            client=ClientModule(),
        )

        def is_ours(request: web.Request) -> bool:
            raw_path = request.rel_url.raw_path
            return raw_path.startswith(PREFIX) or paths.match(raw_path) is not None

        async def dispatch(request: web.Request) -> web.StreamResponse:
            raw_path = request.rel_url.raw_path
            answer = await endpoints.handle(request)
            if answer is not None:
                return answer
            target = paths.match(raw_path)
            if target is not None:
                if target.endpoint is ChatEndpoint.CHAT and _asks_for_websocket(request):
                    return await sdk.handle(request, target)
                return await chat.handle(request, target)
            if raw_path.startswith(PREFIX) or not config.passthrough:
                return not_found()
            return await proxy.handle(request)

        async def close_connections(_: web.Application) -> None:
            await asyncio.gather(connections.close(), proxy.close())

        policy = OriginPolicy(config)
        refused = telemetry.refused_origins
        app = web.Application(
            middlewares=[origin_middleware(policy, is_ours, lambda _: refused.inc())],
            client_max_size=config.max_body_bytes,
        )
        app.router.add_route("*", r"/{path:[\s\S]*}", dispatch)
        app.on_response_prepare.append(remove_added_headers)
        app.on_response_prepare.append(_hide_server)
        app.on_response_prepare.append(cors_signal(policy, is_ours))
        app.on_shutdown.append(close_connections)
        return app

    def _admin_app(self) -> web.Application:
        async def healthz(_: web.Request) -> web.Response:
            return web.Response(text="ok\n")

        async def readyz(_: web.Request) -> web.Response:
            reason = await self._not_ready()
            status = HTTPStatus.OK if reason is None else HTTPStatus.SERVICE_UNAVAILABLE
            return web.Response(status=status, text=f"{reason or 'ready'}\n")

        async def metrics(_: web.Request) -> web.Response:
            body = generate_latest(telemetry.registry)
            return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

        app = web.Application()
        app.router.add_get("/healthz", healthz)
        app.router.add_get("/readyz", readyz)
        app.router.add_get("/metrics", metrics)
        return app

    async def _not_ready(self) -> str | None:
        if self._sessions.draining:
            return "not ready; the node is stopping"
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._lease.check()
        except (StoreUnavailable, StoreError, TimeoutError):
            return "not ready; the store does not answer"
        return None

    def _keep(self, stack: AsyncExitStack, work: Coroutine[object, object, None], name: str) -> None:
        """Run something as long as the node lives."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._kept_ended)
        stack.push_async_callback(_end, task)

    def _kept_ended(self, task: asyncio.Task[None]) -> None:
        """Without a heartbeat, say, the node is not one: better to end than to go on as half of it."""
        if not task.cancelled() and task.exception() is not None and not self.failed.done():
            log.error("node.failed", task=task.get_name(), exc_info=task.exception())
            self.failed.set_result(f"its task {task.get_name()!r} failed")


def _asks_for_websocket(request: web.Request) -> bool:
    return request.method == "GET" and request.headers.get("Upgrade", "").lower() == "websocket"


async def _hide_server(_: web.Request, response: web.StreamResponse) -> None:
    """What the library says of itself is of use to nobody but who looks for its advisories."""
    if response.headers.get("Server") == SERVER_SOFTWARE:
        del response.headers["Server"]


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=END_SECONDS)


async def serve(config: Config, started: Callable[[str], None] = lambda _: None) -> str | None:
    """Run a node until SIGTERM or SIGINT; a second signal ends its drain.

    Args:
        config: All settings.
        started: Told the address, once clients can connect.

    Returns:
        Why it could not go on; ``None`` if it was asked to stop.
    """
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    config = _with_room(config)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    node = Node(config)

    def stop() -> None:
        if asked.is_set():
            node.hurry()
        asked.set()

    # Before it opens: what it starts (the Valkey) must be ended by it, however early the signal comes.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    async with node:
        node.failed.add_done_callback(lambda _: asked.set())
        started(node.address)
        await asked.wait()
        if node.failed.done():
            node.hurry()
            return node.failed.result()
    return None


def _with_room(config: Config) -> Config:
    """As many descriptors as this process may have; a soft limit of 1024 is for who uses ``select``.

    Returns:
        The settings, with no more connections than there are descriptors for: a node without one left can
        reach neither backend nor store.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError) as error:  # macOS knows no unlimited one
            log.info("descriptors.not-raised", limit=soft, error=str(error))
    wanted = 2 * config.max_connections + OWN_DESCRIPTORS  # each may have one to the backend
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return config
    connections = max(1, (soft - OWN_DESCRIPTORS) // 2)
    log.warning(
        "descriptors.too-few",
        limit=soft,
        wanted=wanted,
        connections=connections,
        hint="no more connections are let in; raise the hard limit (ulimit -Hn, LimitNOFILE=), or lower "
        "GATEWAY_MAX_CONNECTIONS",
    )
    return config.model_copy(update={"max_connections": connections})
