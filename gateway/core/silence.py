"""Who is gone: judged by one observer's own clock, over the time in which it heard of the others at all.

Rule 1: silent is who did not change for a lease, as far as the observer could see. No other clock counts:
what a node's score says is only compared with what it said before.
Rule 2: what was not observed proves nothing. Contact that was lost, or had a gap as long as a lease (the
observer itself was frozen), begins anew, and with it everybody's silence.
Rule 3: a doubt about when something happened goes to the silent: a change counts from when it was heard of,
and "no change" only until it was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.core.model import NodeId


class Silence:
    """What one node has observed of all.

    Args:
        lease_seconds: Silence after which a node is gone.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.scores: Mapping[NodeId, float] = {}
        """As they were last observed."""
        self._lease_seconds = lease_seconds
        self._changed_at: dict[NodeId, float] = {}
        self._contact_since: float | None = None
        self._asked_at = 0.0

    def lost(self) -> None:
        """Contact was lost."""
        self._contact_since = None

    def heard(
        self, scores: Mapping[NodeId, float], *, asked_at: float, answered_at: float, anew: bool = False
    ) -> None:
        """An observation of all nodes; they come in the order in which they were asked for.

        Args:
            scores: A node's changes with each of its beats.
            asked_at: When it was asked for, in seconds of the observer's clock.
            answered_at: When it came.
            anew: Whoever answered may be another than the last time, or know less.
        """
        if anew or self._contact_since is None or asked_at - self._asked_at > self._lease_seconds:
            self._contact_since = answered_at
        self._changed_at = {
            node: self._changed_at[node] if self.scores.get(node) == score else answered_at
            for node, score in scores.items()
        }
        self.scores, self._asked_at = scores, asked_at

    @property
    def may_judge(self) -> bool:
        """Whether the observer has been in contact for a lease."""
        return self._contact_since is not None and self._is_lease(self._contact_since)

    def is_gone(self, node: NodeId) -> bool:
        """Whether a node has been silent for a lease, or is not known to anybody."""
        return self.may_judge and (node not in self.scores or self._is_lease(self._changed_at[node]))

    def silent(self) -> dict[NodeId, float]:
        """Who is gone, of those who are known, and their scores."""
        return {node: score for node, score in self.scores.items() if self.is_gone(node)}

    def _is_lease(self, since: float) -> bool:
        return self._asked_at - since >= self._lease_seconds
