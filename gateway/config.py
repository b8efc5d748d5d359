"""The settings: read from the environment once, checked whole, and never again.

Only this module reads the environment. The table in the README is made from it
(``session-gateway settings``).
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from yarl import URL

from gateway.address import parse_address
from gateway.core.model import Overlap

ENVIRONMENT_PREFIX = "GATEWAY_"

KIB = 1024
MIB = 1024 * KIB
MAX_PORT = 65_535

_ORIGIN = re.compile(r"https?://[^/\s?#@]+")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")


class AuthMode(StrEnum):
    """Who may use the gateway."""

    NONE = "none"
    """Whoever reaches it: a session's name is its secret."""


class AbortPolicy(StrEnum):
    """What an ``abort`` frame of the AI SDK's own WebSocket transport means."""

    GRACE = "grace"
    CANCEL = "cancel"
    DETACH = "detach"


class HttpDisconnect(StrEnum):
    """What a closed ``POST`` of the HTTP wire means."""

    DETACH = "detach"
    GRACE = "grace"


class LogFormat(StrEnum):
    """How log lines look."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


class LogLevel(StrEnum):
    """Which log lines are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ConfigError(Exception):
    """The environment does not describe a gateway.

    Attributes:
        problems: One line each: the variable, what is wrong, what to do.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("unable to start; " + "; ".join(problems))
        self.problems = problems


class ListenAddress(str):
    """``host:port``; an IPv6 host stands in brackets; port 0 picks a free one."""

    __slots__ = ()

    @property
    def host(self) -> str:
        """The host without brackets."""
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """0 means any free port."""
        return int(self.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def _comma_separated(value: object) -> object:
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return value


Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=KIB, le=1024 * 1024 * MIB)]


class Config(BaseSettings):
    """Every setting. A field's alias is its environment variable; its description is the README's."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    upstream: str = Field(
        validation_alias="GATEWAY_UPSTREAM",
        description="The backend's base URL, such as `http://127.0.0.1:3000`.",
    )
    chat_paths: Annotated[tuple[str, ...], NoDecode] = Field(
        ("/api/chat",),
        validation_alias="GATEWAY_CHAT_PATH",
        description="The path(s) made durable, comma separated; `*` stands for one segment.",
    )
    session_field: str = Field(
        "id",
        validation_alias="GATEWAY_SESSION_FIELD",
        description="Where the body of a `POST` names its session; dots go into objects.",
    )
    listen: str = Field(
        "127.0.0.1:8080",
        validation_alias="GATEWAY_LISTEN",
        description="`host:port` for clients; port 0 picks one and logs it.",
    )
    admin_listen: str = Field(
        "127.0.0.1:9090",
        validation_alias="GATEWAY_ADMIN_LISTEN",
        description="`host:port` for `/metrics`, `/healthz` and `/readyz`.",
    )
    redis_url: str | None = Field(
        None,
        validation_alias="GATEWAY_REDIS_URL",
        description="Redis >= 7.0 or Valkey: `redis://`, `rediss://`, `unix://`, `redis+sentinel://`, "
        "`redis+cluster://`. Unset: a Valkey of the gateway's own.",
    )
    data_dir: Path = Field(
        Path(".gateway"),
        validation_alias="GATEWAY_DATA_DIR",
        description="Where the gateway's own Valkey keeps its files.",
    )
    embedded_max_memory_bytes: Bytes = Field(
        512 * MIB,
        validation_alias="GATEWAY_EMBEDDED_MAX_MEMORY",
        description="`maxmemory` of the gateway's own Valkey, in bytes; when it is full, sends are refused.",
    )
    key_prefix: str = Field(
        "gw",
        validation_alias="GATEWAY_KEY_PREFIX",
        description="Starts every key, so that several gateways can share one Redis.",
    )
    auth: AuthMode | None = Field(
        None,
        validate_default=True,
        validation_alias="GATEWAY_AUTH",
        description="Who may use it. Unset: loopback only. `none`: whoever reaches it.",
    )
    abort: AbortPolicy = Field(
        AbortPolicy.GRACE,
        validation_alias="GATEWAY_ABORT",
        description="What an `abort` of the AI SDK's own socket means: `grace`, `cancel` or `detach`.",
    )
    abort_grace_seconds: Seconds = Field(
        2.0,
        validation_alias="GATEWAY_ABORT_GRACE",
        description="Seconds in which a resume takes an `abort` back.",
    )
    http_disconnect: HttpDisconnect = Field(
        HttpDisconnect.DETACH,
        validation_alias="GATEWAY_HTTP_DISCONNECT",
        description="What a closed `POST` means: `detach` (nothing) or `grace` (as `GATEWAY_ABORT=grace`).",
    )
    upstream_stop: str | None = Field(
        None,
        validation_alias="GATEWAY_UPSTREAM_STOP",
        description="Called beside a cancel, such as `POST /api/chat/{id}/stop`.",
    )
    overlap: Overlap = Field(
        Overlap.PARALLEL,
        validation_alias="GATEWAY_OVERLAP",
        description="A send while a turn runs: `parallel`, `reject` or `interrupt`.",
    )
    heartbeat_seconds: Seconds = Field(
        25.0,
        validation_alias="GATEWAY_HEARTBEAT",
        description="Seconds of silence after which an open stream gets a sign of life.",
    )
    upstream_header_timeout_seconds: Seconds = Field(
        120.0,
        validation_alias="GATEWAY_UPSTREAM_HEADER_TIMEOUT",
        description="Seconds the backend has to start its answer.",
    )
    upstream_idle_timeout_seconds: Seconds = Field(
        120.0,
        validation_alias="GATEWAY_UPSTREAM_IDLE_TIMEOUT",
        description="Seconds between two events (or comments) of the backend.",
    )
    early_open_seconds: Seconds = Field(
        10.0,
        validation_alias="GATEWAY_EARLY_OPEN",
        description="Seconds without an answer of the backend after which the stream of a `POST` is opened.",
    )
    session_ttl_seconds: Seconds = Field(
        86_400.0,
        validation_alias="GATEWAY_SESSION_TTL",
        description="Seconds after its last use that a session is forgotten.",
    )
    resume_window_seconds: Seconds = Field(
        86_400.0,
        validation_alias="GATEWAY_RESUME_WINDOW",
        description="Seconds after a turn's end that its records are kept.",
    )
    drain_seconds: Seconds = Field(
        300.0,
        validation_alias="GATEWAY_DRAIN",
        description="Seconds that running turns have after SIGTERM; a second signal ends them at once.",
    )
    goaway_spread_seconds: Seconds = Field(
        10.0,
        validation_alias="GATEWAY_GOAWAY_SPREAD",
        description="Seconds over which the clients of a node that stops are sent to the others.",
    )
    lease_seconds: Seconds = Field(
        10.0,
        validation_alias="GATEWAY_LEASE",
        description="Seconds after which a silent node's turns may be ended by another.",
    )
    poll_seconds: Seconds = Field(
        3.0,
        validation_alias="GATEWAY_POLL",
        description="Seconds after which a session is looked at of which no other node told anything, "
        "while a turn of it runs; ten times that otherwise.",
    )
    outage_seconds: Seconds = Field(
        30.0,
        validation_alias="GATEWAY_OUTAGE",
        description="Seconds that running turns are held while the store is away.",
    )
    max_connections: int = Field(
        20_000,
        ge=1,
        le=1_000_000,
        validation_alias="GATEWAY_MAX_CONNECTIONS",
        description="Sockets, event streams and waiting requests of clients on one node; above it 503.",
    )
    max_body_bytes: Bytes = Field(
        16 * MIB,
        validation_alias="GATEWAY_MAX_BODY",
        description="Largest body of a send, and largest frame of a socket, in bytes.",
    )
    max_event_bytes: Bytes = Field(
        MIB,
        validation_alias="GATEWAY_MAX_EVENT",
        description="Largest event of the backend, in bytes.",
    )
    max_turn_bytes: Bytes = Field(
        16 * MIB,
        validation_alias="GATEWAY_MAX_TURN",
        description="Largest answer of the backend, in bytes.",
    )
    max_buffer_bytes: Bytes = Field(
        256 * MIB,
        validation_alias="GATEWAY_MAX_BUFFER",
        description="Bytes of running turns that a node holds; full: sends are refused.",
    )
    max_lag_bytes: Bytes = Field(
        64 * MIB,
        validation_alias="GATEWAY_MAX_LAG",
        description="Bytes that a client may be behind before it gets `resync`.",
    )
    origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        validation_alias="GATEWAY_ORIGINS",
        description="Other origins whose pages may use the gateway, comma separated and exact.",
    )
    forward_headers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        validation_alias="GATEWAY_FORWARD_HEADERS",
        description="More headers that commands and sockets may hand on to the backend, comma separated.",
    )
    passthrough: bool = Field(
        default=True,
        validation_alias="GATEWAY_PASSTHROUGH",
        description="Whether every other path is proxied to the backend.",
    )
    log_level: LogLevel = Field(
        LogLevel.INFO,
        validation_alias="GATEWAY_LOG_LEVEL",
        description="`debug`, `info`, `warning` or `error`.",
    )
    log_format: LogFormat = Field(
        LogFormat.AUTO,
        validation_alias="GATEWAY_LOG_FORMAT",
        description="`json`, `console`, or `auto`: console on a terminal, JSON elsewhere.",
    )

    _split = field_validator("chat_paths", "origins", "forward_headers", mode="before")(_comma_separated)

    @property
    def listen_address(self) -> ListenAddress:
        """Where clients connect."""
        return ListenAddress(self.listen)

    @property
    def admin_address(self) -> ListenAddress:
        """Where operators connect."""
        return ListenAddress(self.admin_listen)

    @field_validator("upstream")
    @classmethod
    def _upstream_is_a_base_url(cls, value: str) -> str:
        url = URL(value)
        if url.scheme not in {"http", "https"} or not url.host:
            raise ValueError("must be a URL such as http://127.0.0.1:3000")
        if url.user or url.password or url.query_string or url.fragment:
            raise ValueError("must hold no user, password, query or fragment")
        return value.rstrip("/")

    @field_validator("chat_paths")
    @classmethod
    def _chat_paths_are_paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one path")
        for path in value:
            if not path.startswith("/") or path == "/" or path.endswith("/") or re.search(r"[?#\s]", path):
                raise ValueError(f"{path!r} must start with '/', not end with it, and hold no '?' or '#'")
            if any("*" in segment and segment != "*" for segment in path.split("/")):
                raise ValueError(f"in {path!r} a '*' must stand alone between slashes")
        return value

    @field_validator("listen", "admin_listen")
    @classmethod
    def _listens_on_host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) > MAX_PORT:
            raise ValueError("must be host:port, such as 127.0.0.1:8080 or [::]:8080")
        return value

    @field_validator("listen")
    @classmethod
    def _listens_elsewhere_than_the_backend(cls, value: str, info: ValidationInfo) -> str:
        upstream = info.data.get("upstream")
        if upstream is not None and ListenAddress(value).port == URL(upstream).port:
            host = URL(upstream).host or ""
            both_here = ListenAddress(value).is_loopback and ListenAddress(f"{host}:0").is_loopback
            if both_here or host == ListenAddress(value).host:
                raise ValueError("is where GATEWAY_UPSTREAM points to; requests would go round for ever")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_url_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            parse_address(value)
        return value

    @field_validator("key_prefix")
    @classmethod
    def _key_prefix_is_plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", value):
            raise ValueError("must be 1 to 64 letters, digits or _ . : -")
        return value

    @field_validator("origins")
    @classmethod
    def _origins_are_exact(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin) or "*" in origin:
                raise ValueError(f"{origin!r} must be exact, such as https://app.example.com")
        return tuple(origin.lower() for origin in value)

    @field_validator("forward_headers")
    @classmethod
    def _forward_headers_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(name.lower() for name in value)
        for name in lowered:
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no header name")
        return lowered

    @field_validator("upstream_stop")
    @classmethod
    def _upstream_stop_is_a_request(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(POST|PUT|DELETE|PATCH) /[^\s?#]*", value):
            raise ValueError("must be a method and a path, such as POST /api/chat/{id}/stop")
        return value

    @field_validator("auth")
    @classmethod
    def _open_to_others_only_when_said(cls, value: AuthMode | None, info: ValidationInfo) -> AuthMode | None:
        # A field, not a model validator: it speaks up beside the other problems, not after them.
        listen = info.data.get("listen")
        if value is None and listen is not None and not ListenAddress(listen).is_loopback:
            raise ValueError(
                f"is not set, and GATEWAY_LISTEN={listen} is open to others; say who may use the gateway "
                "(none: whoever reaches it), or listen on 127.0.0.1"
            )
        return value


def load_config(**overrides: object) -> Config:
    """Read the environment and ``.env``.

    Raises:
        ConfigError: With every problem at once.
    """
    try:
        return Config(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError([_problem(dict(item)) for item in error.errors(include_url=False)]) from None


def _problem(item: dict[str, object]) -> str:
    location = item["loc"]
    message = str(item["msg"]).removeprefix("Value error, ")
    if not isinstance(location, tuple) or not location:
        return message
    name = str(location[0])
    field = Config.model_fields.get(name)
    variable = str(field.validation_alias) if field else name
    if item["type"] == "missing":
        described = next(f for f in Config.model_fields.values() if f.validation_alias == variable)
        return f"{variable} is not set. {described.description}"
    return f"{variable}: {message}"


def misspelt_variables() -> dict[str, str]:
    """Variables that are set and are no setting, but look like one; each with the one it looks like.

    Not an error: Kubernetes sets ``GATEWAY_PORT`` and the like for a service called ``gateway``.
    """
    known = [str(field.validation_alias) for field in Config.model_fields.values()]
    found = {}
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if close:
                found[name] = close[0]
    return found


def settings_table() -> str:
    """The settings as a Markdown table."""
    rows = ["| name | default | |", "|---|---|---|"]
    for field in Config.model_fields.values():
        default = shown_default(field.default)
        shown = "required" if field.is_required() else default and f"`{default}`"
        rows.append(f"| `{field.validation_alias}` | {shown} | {field.description} |")
    return "\n".join(rows)


def shown_default(default: object) -> str:
    """A default as it is written in the environment; empty where there is none."""
    match default:
        case None | ():
            return ""
        case bool():
            return str(default).lower()
        case tuple():
            return ",".join(default)
        case float():
            return f"{default:g}"
        case _:
            return str(default)
