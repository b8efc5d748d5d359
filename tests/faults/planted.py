"""A gateway with a bug: ``python -m tests.faults.planted fence|race|ack``. The torture must find each.

- ``fence``: the journal takes records of a turn whose fence is void, and of one that has ended.
- ``race``: a client goes live before its backlog is read, and what was journalled meanwhile counts as had.
- ``ack``: a cancel is answered when the turn is marked, before anything is closed.

Each changes the gateway in memory as it starts, and fails at once where what it changes is no longer there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.store import Script

CHECKS = (
    r"\n  if known\[2\] ~= ARGV\[5\] or known\[3\] ~= ARGV\[6\] then return \{'FENCED'\} end",
    r"\n  if not is_running\(known\[5\]\) then return \{'ENDED', known\[5\]\} end",
)
"""In `examined` of common.lua."""


def plant_fence() -> None:
    """Leave out what refuses a producer that lost its turn."""
    from gateway import store  # noqa: PLC0415 - it must be changed before the journal loads its scripts

    load = store.load_script

    def load_without_checks(name: str) -> Script:
        script = load(name)
        if name != "append":
            return script
        source = script.source.decode()
        for check in CHECKS:
            source, found = re.subn(check, "", source)
            if found != 1:
                raise LookupError(f"unable to plant; append.lua holds {check!r} {found} times")
        return dataclasses.replace(
            script,
            source=source.encode(),
            sha=hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(),
        )

    for module in list(sys.modules.values()):
        if getattr(module, "load_script", None) is load:
            vars(module)["load_script"] = load_without_checks
    if "gateway.journal" in sys.modules:
        raise LookupError("unable to plant; the journal has loaded its scripts already")


def plant_race() -> None:
    """Begin at the tail's end where it is ahead of the look that told where to begin."""
    from gateway.core.model import Cursor  # noqa: PLC0415 - after the fence, which must come first
    from gateway.subscriber import Subscriber  # noqa: PLC0415 - see above

    place_at = Subscriber.place_at

    def place_live(self: Subscriber, cursor: Cursor, *, last: int, **more: Any) -> None:
        tail = self.tail
        if tail.last is not None and tail.last > last and tail.epoch == cursor.epoch:
            cursor = Cursor(cursor.epoch, tail.last, check=tail.check)
        place_at(self, cursor, last=last, **more)

    Subscriber.place_at = place_live  # type: ignore[method-assign]  # that is the plant


def plant_ack() -> None:
    """Answer a cancel as soon as its turn is marked."""
    from gateway.core.model import CancelResult  # noqa: PLC0415 - see above
    from gateway.sessions import Sessions  # noqa: PLC0415 - see above

    async def answer_at_once(self: Sessions, session: Any, turn: Any, by: Any) -> CancelResult:
        self._turns.cancel(session, turn, by)
        return CancelResult.CANCELLED

    Sessions._cancel_marked  # noqa: B018 - fails where it is called otherwise now
    Sessions._cancel_marked = answer_at_once  # type: ignore[method-assign]  # that is the plant


PLANTS: dict[str, Callable[[], None]] = {"fence": plant_fence, "race": plant_race, "ack": plant_ack}


def main() -> int:
    """Plant what is asked for, and run the gateway."""
    PLANTS[sys.argv[1]]()
    from gateway.__main__ import main as run  # noqa: PLC0415 - the plant comes first

    return run([])


if __name__ == "__main__":
    sys.exit(main())
