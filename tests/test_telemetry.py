"""What is logged, as its readers see it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, structlog
from gateway.config import LogFormat, LogLevel
from gateway.telemetry import set_up_logging

set_up_logging(LogLevel.INFO, LogFormat(sys.argv[1]))

def ask(headers):
    raise RuntimeError("a bug")

try:
    ask({"cookie": "very" + "-secret"})
except RuntimeError:
    structlog.get_logger("it").exception("turn.failed")
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_no_local_variables(form: str) -> None:
    """They are cookies, tokens, and what people write (G9)."""
    command = [sys.executable, "-c", PROGRAM, form]
    told = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stderr
    assert "very-secret" not in told
    assert "turn.failed" in told
    assert "RuntimeError: a bug" in told
    assert "in ask" in told
