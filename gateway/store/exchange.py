"""What was sent on one connection and is not answered yet: replies are told apart by their order alone."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from gateway.store import refusals
from gateway.store.pipeline import ReplyError
from gateway.store.refusals import StoreError, UnusableConnection
from gateway.store.scripts import Script, loading

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.store.calls import Call

_ASKING = b"*1\r\n$6\r\nASKING\r\n"


class Exchange:
    """Calls that are away, and their replies as they come.

    Args:
        scripts: What a server is made to know.

    Attributes:
        follows: Whether somebody takes the calls that a cluster wants elsewhere.
    """

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.follows = False
        self._loading = loading(scripts)
        self._loads: list[None] = [None] * len(scripts)
        self._unanswered: deque[Call | None] = deque()  # None: a script that is loaded, or ASKING
        self._missing: list[Call] = []
        self._redirected: list[tuple[Call, str]] = []

    @property
    def is_over(self) -> bool:
        """Whether all that was sent was answered."""
        return not self._unanswered

    def begin(self, calls: Iterable[Call], *, load: bool) -> list[bytes]:
        """Returns what to write.

        Args:
            calls: In the order in which they are to be carried out.
            load: Whether the scripts come first, for a server that may not know them.
        """
        parts = list(self._loading) if load else []
        if load:
            self._unanswered.extend(self._loads)
        for call in calls:
            if call.detour is not None and call.detour.asking:  # it holds for the one command behind it
                self._unanswered.append(None)
                parts.append(_ASKING)
            self._unanswered.append(call)
            parts += call.parts
        return parts

    def take(self, reply: object) -> None:
        """The next reply.

        Raises:
            UnusableConnection: It fits nothing, or no later one will be of use.
        """
        if not self._unanswered:
            raise UnusableConnection("the store said what nobody asked for")
        call = self._unanswered.popleft()
        if not isinstance(reply, ReplyError):
            if call is not None:
                call.resolve(reply)
            return
        code = refusals.first_word(reply)
        if call is None or refusals.ends_the_connection(reply, code):
            raise UnusableConnection(str(reply))
        if code == "NOSCRIPT":
            self._missing.append(call)
        elif self.follows and code in refusals.MOVED_AWAY:
            self._redirected.append((call, str(reply)))
        else:
            call.resolve(refusals.explained(call.script.name, reply, code))

    def take_missing(self) -> list[Call]:
        """Those whose script the server does not know: SCRIPT FLUSH, or a server that was replaced."""
        missing, self._missing = self._missing, []
        return missing

    def take_redirected(self) -> list[tuple[Call, str]]:
        """Those that a cluster wants elsewhere, each with what it said."""
        redirected, self._redirected = self._redirected, []
        return redirected

    def clear(self) -> None:
        """The connection is gone: no reply will come. Its calls are their owner's to fail."""
        self._unanswered.clear()
        self._missing.clear()
        self._redirected.clear()


def forgotten(call: Call) -> StoreError:
    """For a call whose script was loaded, and is unknown all the same."""
    return StoreError(f"unable to run {call.script.name}; the store forgets its scripts")
