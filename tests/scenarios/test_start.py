"""A gateway whose store is not what its settings say: it ends, and its last line says what to change."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.support.backend import ScriptedBackend, answers
from tests.support.process import GatewayProcess
from tests.support.servers import Server, running_sentinels, sentinel_url
from tests.support.shards import ClusterOfServers
from tests.support.valkey import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = "hunter2"
PREFIX = "start"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def wrong_password(stack: ExitStack) -> str:
    server = stack.enter_context(Server())
    server.admin.acl_setuser("app", enabled=True, passwords=["+other"], keys=["*"], commands=["+@all"])
    return f"redis://app:{SECRET}@{server.address}"


def replica(stack: ExitStack) -> str:
    first, second = stack.enter_context(Server()), stack.enter_context(Server())
    second.admin.replicaof("127.0.0.1", first.port)
    return second.url


def unknown_host(stack: ExitStack) -> str:
    del stack
    return f"redis://:{SECRET}@no-such-host.invalid:6379"


def nobody(stack: ExitStack) -> str:
    del stack
    return f"redis://:{SECRET}@127.0.0.1:{free_port()}"


def wrong_name(stack: ExitStack) -> str:
    sentinels = stack.enter_context(running_sentinels(stack.enter_context(Server())))
    return sentinel_url(sentinels, user=f":{SECRET}@").replace("mymaster", "theirs")


def no_cluster(stack: ExitStack) -> str:
    return f"redis+cluster://{stack.enter_context(Server()).address}"


def one_of_a_cluster(stack: ExitStack) -> str:
    """The one that has the list of nodes, at that: it refuses only some of the sessions."""
    cluster = stack.enter_context(ClusterOfServers(3))
    return cluster.owner(f"{PREFIX}:{{nodes}}").url


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (wrong_password, "invalid username-password pair"),
        (replica, "READONLY"),
        (unknown_host, "no-such-host.invalid"),
        (nobody, "Connect"),
        (wrong_name, "'theirs'"),
        (no_cluster, "cluster support disabled"),
        (one_of_a_cluster, "this server is one of a cluster; say redis+cluster:// in GATEWAY_REDIS_URL"),
    ],
)
async def test_the_last_line_of_a_start_that_fails_says_why(
    made: Callable[[ExitStack], str], reason: str, stack: ExitStack
) -> None:
    """Whoever set it up reads that line, and nothing else; it holds no secret."""
    url = made(stack)
    async with (
        ScriptedBackend(answers) as backend,
        GatewayProcess(upstream=backend.url, redis_url=url, key_prefix=PREFIX) as gateway,
    ):
        assert await gateway.exited() == 1
    last = gateway.log[-1]["text"]
    assert last.startswith("unable to use the store of GATEWAY_REDIS_URL; ")
    assert reason in last
    assert SECRET not in str(gateway.log)
    assert "Traceback" not in str(gateway.log)
