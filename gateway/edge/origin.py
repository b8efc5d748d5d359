"""Which pages may use the gateway, and under which names it answers.

Two doors that a browser would otherwise hold open for any page on the web:

- A WebSocket or a simple ``POST`` goes to any host with that host's cookies, whatever page it comes from.
  So ``Origin`` must be the host asked for, or one that ``GATEWAY_ORIGINS`` names.
- A page can let its own name point to 127.0.0.1 (DNS rebinding), and then it *is* the host asked for. So a
  gateway without ``GATEWAY_AUTH``, which only listens on loopback, answers to loopback names only, and to
  the hosts of ``GATEWAY_ORIGINS``.

A request without ``Origin`` or ``Host`` comes from no browser and passes, unless ``Sec-Fetch-Site`` says that
a foreign page has embedded it. CORS as in
https://fetch.spec.whatwg.org/#http-cors-protocol.
"""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.typedefs import Handler, Middleware

    from gateway.config import Config

_ORIGIN = re.compile(r"https?://(?P<authority>.+)")
_AUTHORITY = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::(?P<port>\d{1,5}))?")
_TOKENS = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_DEFAULT_PORTS = {"80", "443"}

_EXPOSED = "Session-Gateway-Turn, Retry-After, X-Vercel-AI-UI-Message-Stream"
_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
_PREFLIGHT_SECONDS = "600"


class Refused(StrEnum):
    """Why a request was turned away; a label of a metric."""

    HOST = "host"
    ORIGIN = "origin"


class OriginPolicy:
    """Says which origins and hosts are ours.

    Origins are compared by name and port, without regard to case; a port of 80 or 443 counts as none. The
    scheme of the host asked for is not known behind a proxy that ends TLS, so it does not matter there; that
    of an origin in ``GATEWAY_ORIGINS`` does.
    """

    def __init__(self, config: Config) -> None:
        self._named = {_without_default_port(origin) for origin in config.origins}
        self._loopback_only = config.auth is None
        self._named_hosts = {_host_name(origin.partition("://")[2]) for origin in config.origins}

    def allows(self, origin: str | None, host: str) -> bool:
        """Whether a page of ``origin`` may use what it reached as ``host``."""
        return origin is None or _is_host_itself(origin, host) or self._is_named(origin)

    def host_allowed(self, host: str) -> bool:
        """Whether the gateway answers under this name."""
        if not (self._loopback_only and host):
            return True
        name = _host_name(host)
        return name is not None and (_is_loopback(name) or name in self._named_hosts)

    def cors_headers(self, origin: str | None, host: str) -> dict[str, str]:
        """What lets a page of another, allowed origin read an answer; for the others at most ``Vary``."""
        # What one origin may read, a cache must not give to another.
        headers = {"Vary": "Origin"} if self._named else {}
        if origin is not None and self._is_named(origin) and not _is_host_itself(origin, host):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Credentials"] = "true"
            headers["Access-Control-Expose-Headers"] = _EXPOSED
        return headers

    def preflight_headers(self, request_headers: str | None) -> dict[str, str]:
        """What an allowed origin may send, beside :meth:`cors_headers`.

        Args:
            request_headers: ``Access-Control-Request-Headers``; a wildcard would not do with credentials.
        """
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": _PREFLIGHT_SECONDS}
        if request_headers and _TOKENS.fullmatch(request_headers):
            headers["Access-Control-Allow-Headers"] = request_headers
        return headers

    def _is_named(self, origin: str) -> bool:
        return _without_default_port(origin.lower()) in self._named


def origin_middleware(
    policy: OriginPolicy,
    is_ours: Callable[[web.Request], bool],
    on_refused: Callable[[Refused], None] | None = None,
) -> Middleware:
    """Turn foreign hosts away everywhere, and foreign origins from our own endpoints.

    Preflights of allowed origins are answered here. The answers to what follows get their CORS headers from
    :func:`cors_signal`, which must be installed beside this.

    Args:
        policy: Who is foreign.
        is_ours: Whether a request is for an endpoint of the gateway's own, and not just passed on.
        on_refused: Told of each refusal.
    """

    def refuse(why: Refused, status: int, text: str) -> web.Response:
        if on_refused is not None:
            on_refused(why)
        return web.Response(status=status, text=text + "\n", headers={"X-Content-Type-Options": "nosniff"})

    @web.middleware
    async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if not policy.host_allowed(host):
            return refuse(Refused.HOST, 421, _foreign_host(host))
        if not is_ours(request):
            return await handler(request)
        # What a foreign page embeds, such as an image, comes without Origin. It reads nothing, but it would
        # count as a reader.
        embedded = origin is None and request.headers.get("Sec-Fetch-Site") == "cross-site"
        if embedded or not policy.allows(origin, host):
            return refuse(Refused.ORIGIN, 403, _foreign_origin(origin))
        if origin is not None and _is_preflight(request):
            headers = policy.preflight_headers(request.headers.get("Access-Control-Request-Headers"))
            return web.Response(status=204, headers=headers)
        return await handler(request)

    return check_origin


def cors_signal(
    policy: OriginPolicy, is_ours: Callable[[web.Request], bool]
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """For ``app.on_response_prepare``: CORS headers on all our answers, refusals and streams included."""

    async def add_cors_headers(request: web.Request, response: web.StreamResponse) -> None:
        if not is_ours(request):
            return
        headers = policy.cors_headers(request.headers.get("Origin"), request.headers.get("Host", ""))
        vary = headers.pop("Vary", None)
        if vary is not None:
            response.headers["Vary"] = ", ".join([*response.headers.popall("Vary", []), vary])
        # They replace those of a backend whose answer is passed on: two would be none to a browser.
        response.headers.update(headers)

    return add_cors_headers


def _is_preflight(request: web.Request) -> bool:
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def _is_host_itself(origin: str, host: str) -> bool:
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return False
    authority = _normal_authority(match["authority"])
    return authority is not None and authority == _normal_authority(host)


def _normal_authority(authority: str) -> str | None:
    match = _AUTHORITY.fullmatch(authority.lower())
    if match is None:
        return None
    port = match["port"]
    return match["name"] if port is None or port in _DEFAULT_PORTS else f"{match['name']}:{port}"


def _without_default_port(origin: str) -> str:
    scheme, _, authority = origin.partition("://")
    return f"{scheme}://{authority.removesuffix(':443' if scheme == 'https' else ':80')}"


def _host_name(host: str) -> str | None:
    match = _AUTHORITY.fullmatch(host.lower())
    return None if match is None else match["name"]


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _foreign_host(host: str) -> str:
    authority = _normal_authority(host)
    named = f"http://{authority}" if authority else "http://app.example.com"
    return (
        f"unable to answer as {host!r}; without GATEWAY_AUTH the gateway answers to localhost only, so that "
        f"no foreign page can reach it by a name of its own. Set GATEWAY_ORIGINS={named} (with the scheme "
        "that the browser shows), or set GATEWAY_AUTH"
    )


def _foreign_origin(origin: str | None) -> str:
    return (
        f"unable to serve a page of {origin!r}; its origin is neither the host asked for nor named in "
        "GATEWAY_ORIGINS (exact, with scheme and port, comma separated). A proxy in front must pass Host on"
    )
