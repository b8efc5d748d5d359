"""The tree itself: documents that repeat what the code says must say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway import telemetry
from gateway.config import settings_table
from gateway.core import wire

ROOT = Path(__file__).parent.parent
CORE = sorted(path.stem for path in (ROOT / "gateway/core").glob("[a-z]*.py"))


@pytest.mark.parametrize("module", CORE)
def test_each_core_module_has_its_tests(module: str) -> None:
    """The core is where the promises are decided."""
    assert (ROOT / f"tests/core/test_{module}.py").exists()


def test_the_settings_table_of_the_readme_is_the_real_one() -> None:
    """Made by ``session-gateway settings``."""
    assert settings_table() in (ROOT / "README.md").read_text()


def test_the_metrics_table_of_the_docs_is_the_real_one() -> None:
    """Made by ``gateway.telemetry.metrics_table``."""
    assert telemetry.metrics_table() in (ROOT / "docs/operations.md").read_text()


def test_every_command_and_push_has_its_heading_in_the_protocol() -> None:
    """A wire that is not written down is not a promise."""
    headings = "\n".join(re.findall(r"^### .*$", (ROOT / "docs/protocol.md").read_text(), re.MULTILINE))
    names = {
        "hello",
        "heartbeat",
        "goaway",
        "resync",
        "turn-start",
        "chunk",
        "turn-end",
        *wire.KNOWN_COMMANDS,
    }
    assert {name for name in names if f"`{name}`" not in headings} == set()


def test_no_file_names_a_machine_of_ours() -> None:
    """Who clones this has other folders and other registries."""
    wanted = re.compile(r"registry\.npm" + r"js|py" + r"pi\.org|files\.python" + r"hosted|deb\.deb" + r"ian")
    tracked = [
        *ROOT.glob("requirements/*"),
        *ROOT.glob("tests/node/*.json"),
        *ROOT.glob("client/*.json"),
        ROOT / "Makefile",
        ROOT / ".ci/run",
    ]
    assert [path for path in tracked if wanted.search(path.read_text())] == []
