"""Who is gone, by one observer's clock: observations as tables."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import NodeId
from gateway.core.silence import Silence

LEASE = 10.0
OWN, OTHER = NodeId("own"), NodeId("other")


class Observer:
    """Observes at given times; ``other`` has a score, or ``None`` when it is not on the list."""

    def __init__(self) -> None:
        self.silence = Silence(LEASE)
        self.own = 0

    def sees(self, at: float, other: float | None, *, took: float = 0.0, anew: bool = False) -> None:
        self.own += 1
        scores = {OWN: float(self.own)} | ({} if other is None else {OTHER: other})
        self.silence.heard(scores, asked_at=at - took, answered_at=at, anew=anew)

    @property
    def gone(self) -> bool:
        return self.silence.is_gone(OTHER)


@pytest.fixture
def observer() -> Observer:
    return Observer()


def test_who_does_not_change_for_a_lease_is_gone(observer: Observer) -> None:
    """And not a moment before; a score is a name for a change, whatever its value."""
    observer.sees(0, 5)
    observer.sees(3, -7)
    observer.sees(12.9, -7)
    assert not observer.gone
    observer.sees(13, -7)
    assert observer.gone
    assert observer.silence.silent() == {OTHER: -7}
    observer.sees(14, -8)
    assert not observer.gone
    assert observer.silence.silent() == {}


def test_nobody_is_judged_before_a_lease_of_contact(observer: Observer) -> None:
    """A node that has just come has heard nobody yet."""
    assert not observer.gone
    observer.sees(0, None)
    observer.sees(9.9, None)
    assert not observer.gone
    assert not observer.silence.may_judge
    observer.sees(10, None)
    assert observer.gone
    assert observer.silence.silent() == {}, "nobody has it on the list"


def test_contact_that_was_lost_begins_anew(observer: Observer) -> None:
    """All nodes were cut off: whoever is back first finds the others unchanged, and knows nothing by it."""
    for at in range(0, 12, 3):
        observer.sees(at, at)
    observer.silence.lost()
    observer.sees(30, 9)
    observer.sees(39.9, 9)
    assert not observer.gone
    observer.sees(40, 9)
    assert observer.gone


def test_another_store_begins_the_contact_anew(observer: Observer) -> None:
    """It may be a replica that is behind: what it says of others may be old."""
    for at in range(0, 12, 3):
        observer.sees(at, 1)
    observer.sees(12, 1, anew=True)
    assert not observer.gone
    observer.sees(21.9, 1)
    assert not observer.gone
    observer.sees(22, 1)
    assert observer.gone


def test_an_observer_that_was_frozen_judges_nobody(observer: Observer) -> None:
    """The others were frozen with it, as a suspended machine does; they wake a moment later."""
    for at in range(0, 12, 3):
        observer.sees(at, at)
    observer.sees(30, 9)
    assert not observer.gone
    assert not observer.silence.may_judge


def test_an_answer_that_was_long_on_its_way_is_as_old_as_its_question(observer: Observer) -> None:
    """It was asked for, then the observer stood still: all that came meanwhile is not in it."""
    for at in range(0, 12, 3):
        observer.sees(at, at)
    observer.sees(30, 9, took=20)
    assert not observer.gone
    observer.sees(31, 9)
    assert not observer.gone


def test_a_change_counts_from_when_it_was_heard_of(observer: Observer) -> None:
    """Between the question and the answer it may have come at any time."""
    observer.sees(0, 1)
    observer.sees(6, 2, took=5)
    observer.sees(10, 2)
    observer.sees(15.9, 2)
    assert not observer.gone
    observer.sees(16, 2)
    assert observer.gone


@given(
    st.lists(
        st.tuples(
            st.floats(0.1, 15), st.sampled_from([1, 1, 1, 2]), st.sampled_from(["", "", "", "lost", "anew"])
        ),
        max_size=30,
    )
)
def test_who_is_gone_had_a_lease_of_contact_without_a_change(steps: list[tuple[float, int, str]]) -> None:
    """The rule, over any order of what happens."""
    observer = Observer()
    at, score = 0.0, 0
    history: list[tuple[float, int, str]] = []
    for seconds, change, what in steps:
        at += seconds
        score += change - 1
        if what == "lost":
            observer.silence.lost()
        observer.sees(at, score, anew=what == "anew")
        history.append((at, score, what))
        quiet = [history[-1]]
        for later, sooner in pairwise(reversed(history)):
            if later[2] or sooner[1] != score or later[0] - sooner[0] > LEASE:
                break
            quiet.append(sooner)
        assert observer.gone == (at - quiet[-1][0] >= LEASE)
