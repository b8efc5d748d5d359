"""The bench: it works, and it calls a run with a loss an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.answers import Answer, BenchError, Meter
from bench.measure import GATEWAY, SMOKE, measure
from bench.report import report
from bench.rig import System, has_nginx

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL = [system for system in System if system is not System.NGINX or has_nginx()]


def test_every_system_gets_its_row_and_no_chunk_is_lost() -> None:
    """The figures of the README come out of this command; the shortest run of it must hold together."""
    results = measure(SMOKE, lambda _: None)

    for load in (results.steady, results.many, results.burst):
        assert list(load) == ALL
        assert all(row.rate > 0 for row in load.values())
    assert list(results.resume) == list(GATEWAY)
    assert set(results.cancel) == {System.GATEWAY_HTTP, System.GATEWAY_SESSION}
    assert set(results.idle) == {System.GATEWAY_SDK, System.GATEWAY_SESSION}
    lines = report(results, "test").splitlines()
    assert [sum(line.startswith(f"| {system} |") for line in lines) for system in GATEWAY] == [4, 3, 4]


@pytest.mark.parametrize(
    "indexes",
    [(0, 2, 3), (0, 1, 1, 2, 3), (1, 0, 2, 3), (0, 1, 2)],
    ids=["lost", "twice", "swapped", "cut off"],
)
async def test_a_run_with_a_loss_is_no_figure(indexes: Sequence[int]) -> None:
    """A fast gateway that loses chunks would otherwise look best of all."""
    answer = Answer(4, Meter())

    answer.take(b"".join(b'"delta":"%08d.%020d"' % (index, 1) for index in indexes), now=2)
    answer.finish(now=3)

    with pytest.raises(BenchError):
        await answer.ended


async def test_a_whole_answer_is_measured_in_the_window_alone() -> None:
    """What comes before the window opens has the start of the turns in it."""
    meter = Meter()
    answer = Answer(2, meter)

    answer.take(b'"delta":"00000000.00000000000000000005"', now=105)
    meter.is_open = True
    answer.take(b'"delta":"00000001.00000000000000000010"', now=17)
    answer.finish(now=20)

    assert await answer.ended == 20
    assert meter.latencies == [7]
