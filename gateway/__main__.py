"""The command line: ``session-gateway``, ``session-gateway demo``, ``session-gateway settings``."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from typing import TYPE_CHECKING

import structlog
import uvloop

from gateway.app import serve
from gateway.config import Config, ConfigError, load_config, misspelt_variables, settings_table, shown_default
from gateway.core.model import GatewayError
from gateway.demo.backend import serve_backend
from gateway.telemetry import set_up_logging

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger(__name__)

BAD_SETTINGS = 2
FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    command = _parser().parse_args(arguments).command
    try:
        if command == "settings":
            print(settings_table())
            return 0
        if command == "demo":
            return _run_demo()
        return _run(load_config())
    except ConfigError as error:
        print("unable to start; these settings are wrong:", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        for name, meant in misspelt_variables().items():
            print(f"  {name} is no setting; is {meant} meant?", file=sys.stderr)
        print("`session-gateway --help` lists all settings.", file=sys.stderr)
        return BAD_SETTINGS
    except GatewayError as error:
        print(error, file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="session-gateway",
        description="Makes the chats of an unmodified AI SDK backend resumable, shared and stoppable.",
        epilog="Settings (environment variables, or a .env file):\n\n" + _settings_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("session-gateway")
    parser.add_argument("--version", action="version", version=f"session-gateway {version}")
    parser.add_argument(
        "command",
        nargs="?",
        choices=("serve", "demo", "settings"),
        default="serve",
        help="serve (the default); demo: with a built-in backend and page; settings: print the table of them",
    )
    return parser


def _settings_text() -> str:
    lines = []
    for field in Config.model_fields.values():
        default = "required" if field.is_required() else f"default: {shown_default(field.default) or 'none'}"
        lines += [f"  {field.validation_alias}  ({default})", f"      {field.description}"]
    return "\n".join(lines)


def _run(config: Config) -> int:
    set_up_logging(config.log_level, config.log_format)
    for name, meant in misspelt_variables().items():
        log.warning("settings.unknown", variable=name, meant=meant)
    reason = uvloop.run(serve(config))
    if reason is not None:
        print(f"unable to go on; {reason}", file=sys.stderr)
        return FAILED
    return 0


def _run_demo() -> int:
    def started(address: str) -> None:
        print(f"\n  Session Gateway demo: open http://{address} in a browser. Ctrl-C ends it.\n", flush=True)

    async def demo() -> str | None:
        async with serve_backend("127.0.0.1", 0) as port:
            config = load_config(upstream=f"http://127.0.0.1:{port}")
            set_up_logging(config.log_level, config.log_format)
            return await serve(config, started)

    reason = uvloop.run(demo())
    if reason is not None:
        print(f"unable to go on; {reason}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
