"""Whatever a scenario does to the gateway, the gateway itself must not fail."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from gateway.store import lane

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No handler, task or turn died of an exception, though every client was served."""
    with capture_logs() as logs:
        yield
    for entry in logs:
        print(entry)  # noqa: T201 - pytest shows it where a test failed
    faults = [entry for entry in logs if entry["log_level"] in {"error", "critical"}]
    assert not faults
    errors = [
        record
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR
        and (record.name.startswith("aiohttp") or "never retrieved" in record.getMessage())
    ]
    assert not errors, "\n".join(record.getMessage() + "\n" + str(record.exc_info) for record in errors)


@pytest.fixture
def _never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that is held back is late, however slow the machine, and not lost."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 60.0)
