"""Fixtures of the tests of what breaks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from gateway.store import lane

if TYPE_CHECKING:
    from collections.abc import Iterator

LOSSES = frozenset({"journal.renewed"})
"""Told as an error, for an operator should know: the store lost what nobody could write back."""


@pytest.fixture
def node_logs(caplog: pytest.LogCaptureFixture) -> Iterator[list[Any]]:
    """What the nodes of this process log; none of it may be a fault of theirs, whatever the test does."""
    with capture_logs() as logs:
        yield logs
    for entry in logs:
        print(entry)  # noqa: T201 - pytest shows it where a test failed
    faults = [e for e in logs if e["log_level"] in {"error", "critical"} and e["event"] not in LOSSES]
    assert not faults
    errors = [
        record
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR
        and (record.name.startswith("aiohttp") or "never retrieved" in record.getMessage())
    ]
    assert not errors, "\n".join(record.getMessage() + "\n" + str(record.exc_info) for record in errors)


@pytest.fixture
def _soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer need not be waited for as long as in earnest."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 0.4)
