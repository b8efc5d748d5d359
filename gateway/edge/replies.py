"""What HTTP clients of the gateway's own endpoints are answered when something is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.core.model import EndCode, ErrorCode, Refusal, TurnError
from gateway.core.rawjson import encode
from gateway.edge.admission import NoRoom

if TYPE_CHECKING:
    from collections.abc import Mapping

_STATUS = {
    ErrorCode.BAD_REQUEST: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.CONFLICT: 409,
    ErrorCode.BUSY: 409,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.STORE_UNAVAILABLE: 503,
    ErrorCode.DRAINING: 503,
}

_UNAVAILABLE = 503
_BAD_GATEWAY = 502
_GATEWAY_TIMEOUT = 504


def refusal_response(refusal: Refusal) -> web.Response:
    """A refused request, as JSON that names the code and says what to do."""
    body: dict[str, object] = {
        "code": refusal.code,
        "message": refusal.message,
        "retryable": refusal.retryable,
    }
    headers = {}
    if refusal.retry_after_seconds is not None:
        body["retryAfter"] = refusal.retry_after_seconds
        headers["Retry-After"] = str(math.ceil(refusal.retry_after_seconds))
    status = _UNAVAILABLE if isinstance(refusal, NoRoom) else _STATUS[refusal.code]
    response = _json(status, body, headers)
    if refusal.code is ErrorCode.DRAINING or isinstance(refusal, NoRoom):
        response.force_close()  # on a new connection it may meet another node
    return response


def failed_response(error: TurnError, headers: Mapping[str, str]) -> web.Response:
    """A backend that did not answer."""
    status = _GATEWAY_TIMEOUT if error.code is EndCode.UPSTREAM_TIMEOUT else _BAD_GATEWAY
    return _json(status, {"code": error.code, "message": error.message, "retryable": True}, headers)


def _json(status: int, body: dict[str, object], headers: Mapping[str, str]) -> web.Response:
    return web.Response(
        status=status,
        body=encode(body) + b"\n",
        content_type="application/json",
        headers={**headers, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
    )
