"""URLs of a store: what is read, what is refused, and that no refusal tells a secret."""

from __future__ import annotations

import pytest

from gateway.address import Host, Kind, StoreAddress, parse_address
from gateway.config import ConfigError, load_config

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://", StoreAddress(kind=Kind.SERVER, hosts=(Host("localhost", 6379),))),
        ("redis://[::1]:7000/3", StoreAddress(kind=Kind.SERVER, hosts=(Host("::1", 7000),), database=3)),
        (
            "redis://:p%40ss%2F@db_1?db=2",
            StoreAddress(kind=Kind.SERVER, hosts=(Host("db_1", 6379),), database=2, password="p@ss/"),
        ),
        (
            "rediss://user:secret@db.example.com",
            StoreAddress(
                kind=Kind.SERVER,
                hosts=(Host("db.example.com", 6379),),
                username="user",
                password="secret",
                tls={},
            ),
        ),
        (
            "rediss://db?ssl_ca_certs=%2Fetc%2Fca.pem&ssl_check_hostname=false",
            StoreAddress(
                kind=Kind.SERVER,
                hosts=(Host("db", 6379),),
                tls={"ssl_ca_certs": "/etc/ca.pem", "ssl_check_hostname": False},
            ),
        ),
        (
            "rediss://db?ssl_cert_reqs=none",
            StoreAddress(
                kind=Kind.SERVER,
                hosts=(Host("db", 6379),),
                tls={"ssl_cert_reqs": "none", "ssl_check_hostname": False},
            ),
        ),
        ("unix:///run/a%20b.sock?db=1", StoreAddress(kind=Kind.SOCKET, path="/run/a b.sock", database=1)),
        (
            "unix://user:secret@/run/a.sock",
            StoreAddress(kind=Kind.SOCKET, path="/run/a.sock", username="user", password="secret"),
        ),
        (
            "redis+sentinel://one,two:26380",
            StoreAddress(kind=Kind.SENTINEL, hosts=(Host("one", 26_379), Host("two", 26_380))),
        ),
        (
            "rediss+sentinel://user:secret@one/other/4?sentinel_username=guard&sentinel_password=p%26w",
            StoreAddress(
                kind=Kind.SENTINEL,
                hosts=(Host("one", 26_379),),
                primary="other",
                database=4,
                username="user",
                password="secret",
                sentinel_username="guard",
                sentinel_password="p&w",
                tls={},
            ),
        ),
        (
            "redis+cluster://one:7000,two",
            StoreAddress(kind=Kind.CLUSTER, hosts=(Host("one", 7000), Host("two", 6379))),
        ),
    ],
)
def test_a_url_says_where_and_who(url: str, address: StoreAddress) -> None:
    """Each form that the settings table names."""
    assert parse_address(url) == address


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://db", "must start with redis://"),
        ("db:6379", "must start with redis://"),
        ("redis+sentinels://db", "must start with redis://"),
        (f"redis://:{SECRET}/x@db", "%2F"),
        (f"redis://:{SECRET}#x@db", "%23"),
        (f"redis://:x?{SECRET}=x@db", "%3F"),
        (f"redis+cluster://:x,{SECRET} @db:port", "%2C"),
        ("redis://db:0", "host:port"),
        ("redis://db:65536", "host:port"),
        ("redis://db port", "host:port"),
        ("redis://one,two", "redis+cluster://"),
        ("redis://db/cache", "number"),
        ("redis://db?socket_timeout=1", "known are db"),
        ("redis://db?ssl_ca_certs=x", "rediss"),
        ("rediss://db?ssl_check_hostname=perhaps", "true nor false"),
        ("rediss://db?ssl_cert_reqs=maybe", "required, optional and none"),
        ("redis://db?sentinel_password=x", "+sentinel"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("redis+sentinel:///mymaster", "at least one"),
        ("redis+sentinel://one,/mymaster", "at least one"),
        ("redis+sentinel://one/my master", "such as /mymaster"),
        ("redis+cluster://one/1", "none but 0"),
    ],
)
def test_a_url_that_is_wrong_says_what_to_do_and_no_secret(
    url: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found at start, whole, and the log of a deploy is read by many."""
    monkeypatch.setenv("GATEWAY_UPSTREAM", "http://127.0.0.1:3000")
    monkeypatch.setenv("GATEWAY_REDIS_URL", url)
    with pytest.raises(ConfigError) as caught:
        load_config()
    (problem,) = caught.value.problems
    assert problem.startswith("GATEWAY_REDIS_URL: ")
    assert hint in problem
    assert SECRET not in problem


def test_an_address_shows_no_password() -> None:
    """It may end up in a log, or in what a debugger shows."""
    url = f"rediss+sentinel://user:{SECRET}@one/x?sentinel_password={SECRET}&ssl_password={SECRET}"
    assert SECRET not in repr(parse_address(url))
