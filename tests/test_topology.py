"""The store behind sentinels, behind TLS, behind an ACL: each against real servers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from gateway.store import Store, StoreUnavailable, load_script
from gateway.store.lane import OPERATION_TIMEOUT_SECONDS
from tests.support.certificates import Certificates, TlsServer, made_certificates
from tests.support.servers import Replicated, Server, running_sentinels, sentinel_url

if TYPE_CHECKING:
    from collections.abc import Iterator

CLAIM, ORPHANS = load_script("claim"), load_script("orphans")
SCRIPTS = (CLAIM, ORPHANS)
SECRET = "hunter2"


def add(store: Store, member: str = "m") -> asyncio.Future[Any]:
    return store.writes.call(CLAIM, ("set",), (member, "add", 60_000))


def members(store: Store) -> asyncio.Future[Any]:
    return store.reads.call(ORPHANS, ("set",), ())


async def works(url: str) -> None:
    """Calls are carried out in order, and read on the other lane."""
    async with Store(url, SCRIPTS) as store, asyncio.timeout(10):
        assert await asyncio.gather(*(add(store, str(number)) for number in range(20))) == [[b"OK"]] * 20
        assert sorted(map(int, await members(store))) == list(range(20))
        assert not store.is_sharded
        assert [store.shard_of("set")] == list(store.shards())


async def is_away(url: str) -> str:
    """It is no use, and says so in time; returns what was logged."""
    with capture_logs() as logs:
        async with Store(url, SCRIPTS) as store, asyncio.timeout(2 * OPERATION_TIMEOUT_SECONDS):
            with pytest.raises(StoreUnavailable) as caught:
                await add(store)
    return f"{logs} {caught.value}"


# -- sentinels


@pytest.fixture(scope="module")
def primary() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def _empty(primary: Server) -> None:
    primary.admin.flushall()


@pytest.fixture(scope="module")
def sentinels(primary: Server) -> Iterator[list[Server]]:
    with running_sentinels(primary, count=3) as sentinels:
        yield sentinels


async def test_sentinels_tell_who_is_the_primary(primary: Server, sentinels: list[Server]) -> None:
    """Only they are configured."""
    await works(sentinel_url(sentinels))
    assert primary.admin.scard("set") == 20


async def test_one_sentinel_that_answers_is_enough(sentinels: list[Server]) -> None:
    """Of the others one is frozen, so that its kernel accepts, and one is not there at all."""
    with sentinels[0].frozen(), Server() as gone:
        gone.kill()
        await works(sentinel_url([gone, sentinels[0], sentinels[1]]))


async def test_a_primary_that_no_sentinel_knows_is_unavailable(sentinels: list[Server]) -> None:
    """A name that is misspelt: the log has it."""
    assert "other" in await is_away(sentinel_url(sentinels).replace("mymaster", "other"))


async def test_a_sentinel_may_want_a_password_of_its_own(primary: Server) -> None:
    """It has other users than the servers; and the servers' password is not shown to it."""
    with running_sentinels(primary, config=f"requirepass {SECRET}") as guards:
        await works(sentinel_url(guards, query=f"?sentinel_password={SECRET}"))
        assert SECRET not in await is_away(sentinel_url(guards, query="?sentinel_password=wrong"))


async def test_a_server_that_is_a_replica_by_now_is_left(sentinels: list[Server]) -> None:
    """Sentinels need a while to notice; reads of it would be old, and nothing would say so."""
    del sentinels
    async with Replicated() as pair:
        with running_sentinels(pair.replica) as guards:  # they hold it for the primary, at first
            # Theirs or ours: how soon they notice is up to them.
            assert "primary" in await is_away(sentinel_url(guards))


async def test_a_user_that_may_not_ask_for_the_role_is_served(
    primary: Server, sentinels: list[Server]
) -> None:
    """An ACL without the dangerous commands, as the guide has it."""
    primary.admin.acl_setuser("role", enabled=True, passwords=["+p"], keys=["*"], commands=["+@all", "-role"])
    await works(sentinel_url(sentinels, user="role:p@"))


# -- TLS


@pytest.fixture(scope="module")
def certificates() -> Iterator[Certificates]:
    with made_certificates() as made:
        yield made


async def test_a_server_speaks_tls(certificates: Certificates) -> None:
    """Its certificate is checked against the CA that the URL names."""
    with TlsServer(certificates) as server:
        await works(f"rediss://{server.address}?ssl_ca_certs={certificates.authority}")
        await works(f"rediss://{server.address}?ssl_cert_reqs=none")


async def test_a_server_with_a_certificate_of_others_is_not_used(certificates: Certificates) -> None:
    """Whoever stands between must not read the chats; nor the password."""
    with TlsServer(certificates) as server, made_certificates() as other:
        for query in (f"?ssl_ca_certs={other.authority}", ""):
            logged = await is_away(f"rediss://user:{SECRET}@{server.address}{query}")
            assert "certificate verify failed" in logged
            assert SECRET not in logged


async def test_a_certificate_must_name_its_server() -> None:
    """It is signed by the right CA, and for another host; only who says so may pass it."""
    with made_certificates("DNS:elsewhere") as named, TlsServer(named) as server:
        url = f"rediss://{server.address}?ssl_ca_certs={named.authority}"
        assert "verify failed" in await is_away(url)
        await works(f"{url}&ssl_check_hostname=false")


async def test_tls_to_a_server_without_is_unavailable(primary: Server) -> None:
    """A port that was mixed up; it does not hang."""
    await is_away(f"rediss://{primary.address}")


async def test_plain_text_to_a_server_with_tls_is_unavailable(certificates: Certificates) -> None:
    """The other way round."""
    with TlsServer(certificates) as server:
        await is_away(server.url)


async def test_a_cluster_speaks_tls(certificates: Certificates) -> None:
    """Also to servers that only the map names."""
    options = ("--cluster-enabled", "yes", "--tls-cluster", "yes", "--tls-replication", "yes")
    with TlsServer(certificates, *options) as server:
        with server.admin as admin:
            admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        query = f"?ssl_ca_certs={certificates.authority}"
        async with Store(f"rediss+cluster://{server.address}{query}", SCRIPTS) as store:
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert await add(store) == [b"OK"]
                        break
                    except StoreUnavailable:  # it takes it a moment to be whole
                        await asyncio.sleep(0.05)


async def test_sentinels_speak_tls_as_their_servers_do(certificates: Certificates) -> None:
    """One scheme for both."""
    with TlsServer(certificates) as server:
        config = (
            f"tls-replication yes\nsentinel monitor mymaster 127.0.0.1 {server.port} 1\n"
            "sentinel down-after-milliseconds mymaster 5000"
        )
        with TlsServer(certificates, "--sentinel", config=config) as guard:
            url = f"rediss+sentinel://{guard.address}/mymaster?ssl_ca_certs={certificates.authority}"
            await works(url)


# -- who may


async def test_a_user_of_an_acl_is_served(primary: Server) -> None:
    """User and password come with the URL, and leave in no log."""
    primary.admin.acl_setuser("app", enabled=True, passwords=[f"+{SECRET}@/"], keys=["*"], commands=["+@all"])
    await works(f"redis://app:{SECRET}%40%2F@{primary.address}")
    assert SECRET not in await is_away(f"redis://app:{SECRET}@{primary.address}")


async def test_a_database_of_its_own(primary: Server) -> None:
    """Not the first one, for a server that is shared."""
    await works(f"{primary.url}/5")
    assert primary.admin.info("keyspace")["db5"]["keys"] == 1
    primary.admin.flushall()
