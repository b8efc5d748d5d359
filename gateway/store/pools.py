"""How a connection to a server is made, by redis-py: addresses, TLS, passwords, databases, discovery.

Nothing here retries, and nothing waits for long: whoever wants a connection has a deadline of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis.asyncio import ConnectionPool, SSLConnection
from redis.asyncio.connection import Connection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import NoPermissionError

from gateway.address import Host, Kind, StoreAddress

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

CONNECT_SECONDS = 2.0

DISCOVERY_SECONDS = 1.5
"""For asking all sentinels, one after the other: frozen ones must leave time for the rest, and to connect."""


def server_pool(address: StoreAddress, host: Host | None = None) -> ConnectionPool:
    """Connections to the one server, or to one server of a cluster.

    Args:
        address: Who we are, and with what TLS.
        host: Which server, if not the address's.
    """
    common: dict[str, Any] = {
        **_common(),
        **_credentials(address.username, address.password),
        "db": address.database,
    }
    if address.kind is Kind.SOCKET:
        return ConnectionPool(UnixDomainSocketConnection, path=address.path, **common)
    host = host or address.hosts[0]
    common.update(host=host.host, port=host.port)
    if address.tls is None:
        return ConnectionPool(Connection, **common)
    common.update(address.tls)
    return ConnectionPool(SSLConnection, **common)


class PrimaryPool:
    """Connections to whoever is the primary, as the sentinels say when one is made.

    Args:
        address: With the sentinels.
    """

    def __init__(self, address: StoreAddress) -> None:
        tls: dict[str, Any] = {} if address.tls is None else {"ssl": True, **address.tls}
        seconds = min(0.5, DISCOVERY_SECONDS / len(address.hosts))
        self._sentinel = Sentinel(  # type: ignore[no-untyped-call]
            address.hosts,
            sentinel_kwargs=_common()
            | _credentials(address.sentinel_username, address.sentinel_password)
            | tls
            | {"socket_timeout": seconds, "socket_connect_timeout": seconds},
        )
        self._pool = _SentinelPool(  # type: ignore[no-untyped-call]
            address.primary,
            self._sentinel,
            redis_connect_func=_greet_primary,
            db=address.database,
            **_common(),
            **_credentials(address.username, address.password),
            **tls,
        )

    def make_connection(self) -> AbstractConnection:
        """One that asks the sentinels when it connects."""
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    async def primary(self) -> Host:
        """Ask the sentinels. The caller sets the deadline.

        Raises:
            redis.exceptions.RedisError: None of them knows.
        """
        return Host(*await self._pool.get_master_address())

    async def aclose(self) -> None:
        """Close what was kept to the sentinels."""
        await self._sentinel.aclose()


class _SentinelPool(SentinelConnectionPool):
    async def get_master_address(self) -> tuple[str, int]:
        """Asks; its own error shows each sentinel with all its options."""
        try:
            address: tuple[str, int] = await super().get_master_address()  # type: ignore[no-untyped-call]
        except MasterNotFoundError:
            name = self.service_name
            raise ConnectionFailed(f"no sentinel answers and knows a primary called {name!r}") from None
        return address


async def _greet_primary(connection: AbstractConnection) -> None:
    """As every connection begins; and a replica is left: a sentinel may not know yet that it is one."""
    await connection.on_connect()
    await connection.send_command("ROLE")
    try:
        role = await connection.read_response()
    except NoPermissionError:  # an ACL may keep it from us; then the first write tells
        return
    if not role or role[0] not in {b"master", "master"}:
        raise ConnectionFailed("the sentinels named a server that is no primary")


def _credentials(username: str | None, password: str | None) -> dict[str, Any]:
    return {"username": username, "password": password}


def _common() -> dict[str, Any]:
    return {
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "protocol": 2,
        "client_name": "session-gateway",
    }
