"""Where the store is, read from a URL.

::

    redis://user:password@host:6379/0            one server; rediss:// with TLS
    unix:///path/to/socket?db=0                  the same, on a socket of this machine
    redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0
    redis+cluster://user:password@host1:6379,host2:6379

``rediss+sentinel://`` and ``rediss+cluster://`` speak TLS with every server and every sentinel. User and
password are the servers'; the sentinels' are the parameters ``sentinel_username`` and ``sentinel_password``.
No error names a part of the URL in which a password may stand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

__all__ = ["PARAMETERS", "Host", "Kind", "StoreAddress", "parse_address"]

SERVER_PORT, SENTINEL_PORT, MAX_PORT = 6379, 26_379, 65_535

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9._-]*))(?::([0-9]{1,5}))?")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_ENCODE = "in a name or password write @ : / ? # , and % as %40 %3A %2F %3F %23 %2C %25"

TLS_PARAMETERS = (
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
    "ssl_cert_reqs",
    "ssl_check_hostname",
)
PARAMETERS = ("db", "username", "password", "sentinel_username", "sentinel_password", *TLS_PARAMETERS)


class Kind(Enum):
    """How the servers stand together."""

    SERVER = "server"
    SOCKET = "socket"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_SCHEMES = {
    "redis": (Kind.SERVER, False),
    "rediss": (Kind.SERVER, True),
    "unix": (Kind.SOCKET, False),
    "redis+sentinel": (Kind.SENTINEL, False),
    "rediss+sentinel": (Kind.SENTINEL, True),
    "redis+cluster": (Kind.CLUSTER, False),
    "rediss+cluster": (Kind.CLUSTER, True),
}


class Host(NamedTuple):
    """One server, or one sentinel."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """Where the store is, and who we are to it.

    Attributes:
        kind: How its servers stand together.
        hosts: The server; or the sentinels, or some of the cluster's servers, of which one must answer.
        path: Of the socket.
        primary: What the sentinels call it.
        database: Always 0 in a cluster.
        username: For the servers, as ``password``.
        sentinel_username: For the sentinels, as ``sentinel_password``.
        tls: ``None`` without; else how, in redis-py's words.
    """

    kind: Kind
    hosts: tuple[Host, ...] = ()
    path: str = ""
    primary: str = "mymaster"
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: dict[str, str | bool] | None = field(default=None, repr=False)


def parse_address(url: str) -> StoreAddress:
    """Read a URL.

    Raises:
        ValueError: It is none of ours; says what to do, and holds nothing secret.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"must start with {'://, '.join(_SCHEMES)}://")
    kind, is_secure = _SCHEMES[scheme]
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    if "#" in url or "@" in query or ("@" in path and kind is not Kind.SOCKET):
        # A password with one of them in it, of which a part would be told as something else.
        raise ValueError(f"is not made as a URL should be; {_ENCODE}")
    user, _, hosts = authority.rpartition("@")
    username, _, password = user.partition(":")
    parameters = _parameters(query, is_secure=is_secure, kind=kind)
    name = unquote(username) or parameters.get("username")
    secret = unquote(password) or parameters.get("password")
    if kind is Kind.SOCKET:
        if hosts or not path:
            raise ValueError("must name a socket, such as unix:///run/redis.sock, with three slashes")
        database = _database(parameters.get("db"))
        path = "/" + unquote(path)
        return StoreAddress(kind=kind, path=path, database=database, username=name, password=secret)
    primary, database = _primary_and_database(kind, path, parameters.get("db"))
    return StoreAddress(
        kind=kind,
        hosts=_hosts(hosts, kind),
        primary=primary,
        database=database,
        username=name,
        password=secret,
        sentinel_username=parameters.get("sentinel_username"),
        sentinel_password=parameters.get("sentinel_password"),
        tls=_tls(parameters) if is_secure else None,
    )


def _parameters(query: str, *, is_secure: bool, kind: Kind) -> dict[str, str]:
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    for name in parameters:
        if name not in PARAMETERS:
            raise ValueError(f"has an unknown parameter {name!r}; known are {', '.join(PARAMETERS)}")
        if name in TLS_PARAMETERS and not is_secure:
            raise ValueError(f"has the parameter {name!r}, which needs a rediss scheme")
        if name.startswith("sentinel_") and kind is not Kind.SENTINEL:
            raise ValueError(f"has the parameter {name!r}, which needs a +sentinel scheme")
    return parameters


def _hosts(text: str, kind: Kind) -> tuple[Host, ...]:
    names = text.split(",")
    if kind is Kind.SERVER and len(names) > 1:
        raise ValueError("names several hosts; say redis+sentinel:// or redis+cluster://, or name one")
    default_port = SENTINEL_PORT if kind is Kind.SENTINEL else SERVER_PORT
    hosts = []
    for name in names:
        match = _HOST.fullmatch(name.strip())
        port = int((match and match[3]) or default_port)
        if match is None or not 0 < port <= MAX_PORT:
            raise ValueError(f"has a host that is not host or host:port; {_ENCODE}")
        host = match[1] or match[2]
        if not host and kind is not Kind.SERVER:
            raise ValueError("has an empty host; name at least one, such as host1:26379,host2:26379")
        hosts.append(Host(host or "localhost", port))
    return tuple(hosts)


def _primary_and_database(kind: Kind, path: str, parameter: str | None) -> tuple[str, int]:
    primary = "mymaster"
    if kind is Kind.SENTINEL:
        name, _, path = path.partition("/")
        primary = unquote(name) or primary
        if not _NAME.fullmatch(primary):
            raise ValueError(
                "must end with the name that the sentinels know the primary by, such as /mymaster, or "
                "/mymaster/1 for a database"
            )
    database = _database(parameter if parameter is not None else path.strip("/"))
    if kind is Kind.CLUSTER and database:
        raise ValueError("names a database; a cluster has none but 0")
    return primary, database


def _database(text: str | None) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ValueError("names a database that is no number")
    return int(text)


def _tls(parameters: dict[str, str]) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {name: parameters[name] for name in TLS_PARAMETERS if name in parameters}
    if "ssl_check_hostname" in options:
        value = str(options["ssl_check_hostname"]).lower()
        if value not in _TRUTH:
            raise ValueError("has ssl_check_hostname that is neither true nor false")
        options["ssl_check_hostname"] = _TRUTH[value]
    if options.get("ssl_cert_reqs", "required") not in {"required", "optional", "none"}:
        raise ValueError("has ssl_cert_reqs that is none of required, optional and none")
    if options.get("ssl_cert_reqs") == "none":
        options["ssl_check_hostname"] = False  # Python refuses the one without the other
    return options
