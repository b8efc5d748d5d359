"""Commands of the session protocol by POST: one command, one reply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from gateway.core import wire
from gateway.core.model import By, Refusal, bad_request
from gateway.edge.commands import CLIENT_IS_GONE, answered, client_of, refused

if TYPE_CHECKING:
    from gateway.edge.commands import Commands
    from gateway.edge.requests import BodyReader


class CommandPost:
    """Serves ``POST /gateway/v1/commands``.

    Args:
        commands: Those that the socket has as well.
        bodies: Reads them; one reader for the whole node, which bounds what all of them hold.
    """

    def __init__(self, commands: Commands, bodies: BodyReader) -> None:
        self._commands = commands
        self._bodies = bodies

    async def handle(self, request: web.Request) -> web.Response:
        """Carry out one command. What has begun goes on when its client leaves."""
        identifier: wire.CommandId | None = None
        try:
            by = By(client=client_of(request))
            command = wire.parse_command(await self._bodies.read(request))
            identifier = command.id
            return answered(await self._carry_out(request, command, by))
        except wire.BadCommand as refusal:
            return refused(refusal.id, refusal)
        except Refusal as refusal:
            return refused(identifier, refusal)
        except ConnectionError:
            return web.Response(status=CLIENT_IS_GONE)

    async def _carry_out(self, request: web.Request, command: wire.Command, by: By) -> bytes:
        match command:
            case wire.Send():
                replies: list[bytes] = []
                await self._commands.send(request, command, by, replies.append)
                return replies[0]
            case wire.Cancel():
                return await self._commands.cancel(command, by)
            case wire.Ping():
                return wire.pong(command.id)
            case wire.Attach() | wire.Detach():
                raise bad_request(
                    "unable to attach or detach by a request that ends; "
                    "GET /gateway/v1/sessions/{session}/events has the session's records"
                )
