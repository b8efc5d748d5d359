"""The pure core: no clock, no files, no environment."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_environment() -> None:
    """Nothing to keep apart: the core reads no setting, and a folder per test would double the time."""
