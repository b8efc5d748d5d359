"""The load: one scenario per process, asked for as JSON on stdin, answered as JSON on stdout."""

from __future__ import annotations

import gc
import json
import sys
from typing import TYPE_CHECKING, Any

import uvloop

from bench.answers import BenchError
from bench.breaking import freeze_store, kill_node
from bench.carriers import first_chunk, reconnect, through_client
from bench.clients import Wire
from bench.moments import cancel, catch_up, idle
from bench.soak import soak
from bench.storm import catch_up_crowd, idle_crowd, storm
from bench.streaming import stream

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

SCENARIOS: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
    "stream": stream,
    "catch_up": catch_up,
    "cancel": cancel,
    "idle": idle,
    "through_client": through_client,
    "first_chunk": first_chunk,
    "reconnect": reconnect,
    "idle_crowd": idle_crowd,
    "storm": storm,
    "catch_up_crowd": catch_up_crowd,
    "soak": soak,
    "kill_node": kill_node,
    "freeze_store": freeze_store,
}


def main() -> int:
    """Run the scenario that stdin names."""
    asked = json.load(sys.stdin)
    for name, kind in (("wire", Wire), ("wires", lambda wires: [Wire(wire) for wire in wires])):
        if name in asked["arguments"]:
            asked["arguments"][name] = kind(asked["arguments"][name])
    gc.disable()
    try:
        result = uvloop.run(SCENARIOS[asked["scenario"]](**asked["arguments"]))
    except (BenchError, OSError, TimeoutError) as error:
        print(str(error) or f"unable to measure; {type(error).__name__}", file=sys.stderr)
        return 1
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
