from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.placement import NOT_KNOWN_THERE, Found, GoOn, Placement, Remedy, Restore, Wait

E, OTHER = "e1", "e2"

_BATCHES = st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.booleans()), max_size=8)
"""Who wrote (True: the turn), how many records, and whether the answer came."""


class Truth:
    """A journal in which a turn and others write; and what the turn's producer is told of it."""

    def __init__(self, start: int, batches: list[tuple[bool, int, bool]]) -> None:
        self.start = start
        self.placement = Placement(E, start)
        self.ours: list[int] = []
        self.known: set[int] = set()
        self.last = start
        told = 0
        for is_ours, size, is_told in batches:
            self.last += size
            if is_ours:
                new = range(self.last - size + 1, self.last + 1)
                self.ours += new
                self.placement.wrote(E, self.last, len(self.ours), new=size if is_told else 0)
                alone = self.last == start + len(self.ours)
                self.known |= set(new) if is_told else set()
                self.known |= set(self.ours[told:]) if alone else set()
                told = len(self.ours)

    def found(self, cut: int) -> Found:
        kept = sum(offset <= cut for offset in self.ours)
        return Found(E, cut, kept if cut >= self.start else NOT_KNOWN_THERE)

    def expected(self, cut: int, seen: int) -> Remedy:
        """What is to be done when a journal ends at ``cut`` of which all up to ``seen`` was seen."""
        mine = {*self.ours, self.start}
        lost = {offset for offset in mine if offset > cut}
        everything = set(range(cut + 1, seen + 1))
        is_all = lost == everything and lost <= self.known | {self.start}
        if self.start in lost:
            return Restore(0, 0, renews=not is_all)
        if not lost:
            return Wait()
        return Restore(self.found(cut).count, self.start, renews=not is_all)


@given(start=st.integers(1, 5), batches=_BATCHES, cut=st.integers(0, 40))
@example(start=3, batches=[(True, 2, True), (True, 1, True)], cut=4)
@example(start=3, batches=[(True, 2, True), (False, 1, True), (True, 1, True)], cut=4)
@example(start=3, batches=[(True, 2, True), (False, 1, True)], cut=4)
@example(start=3, batches=[(True, 2, False), (True, 2, False)], cut=3)
@example(start=3, batches=[(False, 1, True), (True, 2, False)], cut=4)
@example(start=3, batches=[(True, 2, True)], cut=2)
@example(start=3, batches=[(False, 1, True), (True, 1, True), (True, 1, False), (True, 1, True)], cut=4)
@example(start=3, batches=[], cut=2)
@example(start=3, batches=[(False, 1, True), (True, 2, True)], cut=4)
@example(start=3, batches=[(False, 1, True)], cut=3)
def test_what_is_written_back_in_its_place_is_all_that_was_lost(
    start: int, batches: list[tuple[bool, int, bool]], cut: int
) -> None:
    """No offset is ever used for two things: everything else goes on in a new epoch, or waits for others."""
    truth = Truth(start, batches)
    cut = min(cut, truth.last)
    if cut < truth.last:
        assert truth.placement.remedy(truth.found(cut), truth.last) == truth.expected(cut, truth.last)


@given(start=st.integers(1, 5), batches=_BATCHES, past=st.integers(0, 3))
def test_the_place_of_a_record_is_told_where_it_is_known(
    start: int, batches: list[tuple[bool, int, bool]], past: int
) -> None:
    """An end that was lost is journalled behind the same record again, and nowhere else."""
    truth = Truth(start, batches)
    assert truth.placement.count == len(truth.ours)
    for index, offset in enumerate(truth.ours):
        assert truth.placement.before(index) == (offset - 1 if offset in truth.known else None)
    assert truth.placement.before(len(truth.ours) + past) is None


@given(start=st.integers(1, 5), batches=_BATCHES, cut=st.integers(0, 40), size=st.integers(1, 50))
def test_a_turn_that_was_written_back_stands_where_it_stood(
    start: int, batches: list[tuple[bool, int, bool]], cut: int, size: int
) -> None:
    """In one batch or in several, with the start or without: then it can be done once more."""
    truth = Truth(start, batches)
    placement, last = truth.placement, truth.last
    cut = min(cut, last)
    before = [placement.before(index) for index in range(len(truth.ours))]
    while cut < last:
        remedy = placement.remedy(truth.found(cut), last)
        if not isinstance(remedy, Restore) or remedy.renews:
            return
        assert truth.expected(cut, last) == remedy
        written = min(size, len(truth.ours) - remedy.index)
        cut += written + (remedy.first == 0)
        placement.restored(E, cut, remedy.index + written, written=written, start=remedy.first)
        assert placement.start == start
    assert [placement.before(index) for index in range(len(truth.ours))] == before


@given(
    start=st.integers(1, 5),
    batches=_BATCHES,
    cut=st.integers(0, 40),
    gap=st.integers(0, 3),
    more=st.integers(0, 3),
)
def test_a_turn_in_a_new_epoch_stands_where_it_was_written(
    start: int, batches: list[tuple[bool, int, bool]], cut: int, gap: int, more: int
) -> None:
    """What survived keeps its offset; nothing is believed to be where it is not."""
    truth = Truth(start, batches)
    placement, cut = truth.placement, min(cut, truth.last)
    found = truth.found(cut)
    remedy = Restore(max(0, found.count), 0 if found.count < 0 else start, renews=True)
    written = len(truth.ours) - remedy.index + more
    begins = cut + 1 if remedy.first == 0 else 0
    last = cut + written + (remedy.first == 0)
    placement.restored(OTHER, last, remedy.index + written, written=written, start=remedy.first)
    assert (placement.epoch, placement.start, placement.count) == (
        OTHER,
        begins or start,
        remedy.index + written,
    )
    for number in range(written):
        assert placement.before(remedy.index + number) == last - written + number
    placement.wrote(OTHER, last + gap + 1, remedy.index + written + 1, new=1)
    assert placement.before(remedy.index + written) == last + gap


@pytest.mark.parametrize(
    ("found", "seen", "remedy"),
    [
        (Found(OTHER, 9, 1), 9, GoOn(1)),
        (Found(OTHER, 9, 3), 0, GoOn(3)),
        (Found(OTHER, 9, 1, rewound=True), 9, Wait()),
        (Found(OTHER, 9, 3, rewound=True), 0, Wait()),
        (Found(OTHER, 9, NOT_KNOWN_THERE, rewound=True), 9, Restore(0, 0, renews=False)),
        (Found(OTHER, 9, NOT_KNOWN_THERE), 9, Restore(0, 0, renews=False)),
        (Found("", 0, NOT_KNOWN_THERE), 0, Restore(0, 0, renews=True)),
        (Found(E, 6, NOT_KNOWN_THERE), 6, Restore(3, 3, renews=False)),
        (Found(E, 9, NOT_KNOWN_THERE), 6, Restore(3, 3, renews=False)),
        (Found(E, 9, NOT_KNOWN_THERE, rewound=True), 6, Restore(0, 0, renews=True)),
        (Found(E, 6, NOT_KNOWN_THERE, rewound=True), 6, Restore(0, 0, renews=True)),
        (Found(E, 2, NOT_KNOWN_THERE, rewound=True), 6, Restore(0, 0, renews=False)),
        (Found(E, 2, NOT_KNOWN_THERE, rewound=True), 7, Restore(0, 0, renews=True)),
        (Found(E, 5, NOT_KNOWN_THERE), 0, Restore(0, 0, renews=True)),
        (Found(E, 9, 3), 6, Wait()),
        (Found(E, 5, 2), 6, Restore(2, 3, renews=False)),
        (Found(E, 5, 2), 7, Restore(2, 3, renews=True)),
        (Found(E, 5, 2), 0, Restore(2, 3, renews=True)),
        (Found(E, 7, 2), 7, Restore(2, 3, renews=True)),
    ],
)
def test_each_way_to_find_a_journal_has_its_remedy(found: Found, seen: int, remedy: Remedy) -> None:
    """A turn begun at 3 with records at 4, 5 and 6."""
    placement = Placement(E, 3)
    placement.wrote(E, 6, 3, new=3)
    assert placement.remedy(found, seen) == remedy


def test_a_start_that_is_behind_the_journals_end_is_lost() -> None:
    """Also where nobody remembers what was seen of that epoch."""
    placement = Placement(E, 3)
    assert placement.remedy(Found(E, 2, NOT_KNOWN_THERE), 0) == Restore(0, 0, renews=True)
    assert placement.remedy(Found(E, 3, NOT_KNOWN_THERE), 0) == Restore(0, 3, renews=False)


def test_a_turn_whose_own_key_is_gone_is_held_by_the_journal_all_the_same() -> None:
    """It has ended, and is whole; a second end would be one too many."""
    placement = Placement(E, 3)
    placement.wrote(E, 6, 3, new=3)
    assert placement.holds_all(Found(E, 6, NOT_KNOWN_THERE), 3)
    assert placement.holds_all(Found(E, 9, NOT_KNOWN_THERE), 3)
    assert not placement.holds_all(Found(E, 9, NOT_KNOWN_THERE, rewound=True), 3)
    assert not placement.holds_all(Found(E, 5, NOT_KNOWN_THERE), 3)
    assert not placement.holds_all(Found(OTHER, 6, NOT_KNOWN_THERE), 3)
    assert not placement.holds_all(Found(E, 6, NOT_KNOWN_THERE), 4)
    placement.ended(5)
    assert placement.count == 5
    assert placement.before(4) is None
    assert placement.holds_all(Found(E, 8, NOT_KNOWN_THERE), 5)
    placement.ended(5)
    assert placement.count == 5


def test_what_is_written_elsewhere_is_not_believed_to_stand_where_it_stood() -> None:
    """In another epoch it comes behind what others wrote; a later loss is judged by its new place."""
    placement = Placement(E, 3)
    placement.wrote(E, 6, 3, new=3)
    placement.forget(1)
    placement.wrote(OTHER, 9, 3, new=2)
    assert [placement.before(index) for index in range(3)] == [3, 7, 8]
    assert placement.remedy(Found(OTHER, 7, 1), 9) == Restore(1, 3, renews=False)
