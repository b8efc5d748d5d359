"""The pure core: no clock, no files, no environment."""

from __future__ import annotations

import pytest
from hypothesis import settings

# Without a deadline: a busy machine must not fail a property. Failing examples are printed, not kept.
settings.register_profile("core", deadline=None, database=None, max_examples=80)
settings.load_profile("core")


@pytest.fixture(autouse=True)
def _own_environment() -> None:
    """Nothing to keep apart: the core reads no setting, and a folder per test would double the time."""
