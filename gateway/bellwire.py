"""One pub/sub connection to one shard: which channels are subscribed there, and whether it still hears.

Subscriptions that are asked for within one turn of the event loop leave in one write, and no more than
:data:`MAX_UNANSWERED` are on their way. A connection that is lost is made again, with backoff, and all is
subscribed anew. One that has gone silent does not say so: so it rings for itself, by the store's writer, and
one that does not hear that is replaced.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from redis.exceptions import RedisError

from gateway import telemetry
from gateway.store.pipeline import Pipeline, ReplyError, pack, packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.store.topology import Shard

log = structlog.get_logger(__name__)

MAX_UNANSWERED = 1024
"""Subscriptions on their way; some 64 KiB."""

CONNECT_SECONDS = 2.0

BACKOFF_SECONDS = (0.05, 2.0)
"""The first, and the longest; doubled in between. Meanwhile bells are lost, and GATEWAY_POLL finds what
they would have told of."""

ASK_AGAIN_SECONDS = (0.1, 2.0)
"""A slot that moves is nobody's for a moment; the first wait, and the longest."""

REFUSED_AGAIN_SECONDS = 10.0
"""What an ACL refuses it may allow later; and nothing else would ask again."""

_SUBSCRIBE, _UNSUBSCRIBE = packed("SSUBSCRIBE"), packed("SUNSUBSCRIBE")
_NOT_HERE_NOW = frozenset(("MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "LOADING", "MASTERDOWN"))


class Ears(Protocol):
    """Who is told what a wire hears."""

    own_bell: bytes
    """What this node rings when it has journalled something; not told."""

    def heard(self, channel: bytes, payload: bytes) -> None:
        """A bell."""

    def confirmed(self, channel: bytes) -> None:
        """The channel is subscribed from now on; what was rung before may not have been heard."""

    def misplaced(self) -> None:
        """A channel, or all of them, may be another shard's now."""


class BellWire:
    """The pub/sub connection to one shard.

    Args:
        shard: Which.
        ears: Told what is heard.
        probe: A channel of this shard for the wire's own bell; empty: none was found, and it is not probed.
        ring: Rings it, by another connection.
        probe_seconds: How often; a bell that is not heard for so long means a new connection.
    """

    def __init__(
        self,
        shard: Shard,
        ears: Ears,
        *,
        probe: bytes,
        ring: Callable[[bytes, bytes], asyncio.Future[Any]],
        probe_seconds: float,
    ) -> None:
        self.shard = shard
        self._ears = ears
        self._probe = probe
        self._ring = ring
        self._probe_seconds = probe_seconds
        self._channels: set[bytes] = set()
        self._is_wanted = asyncio.Event()
        self._asked: dict[bytes, bool] = {}
        """What is still to be sent: True to subscribe, False to unsubscribe."""
        self._unanswered: deque[tuple[bytes, bool]] = deque()
        self._later: set[bytes] = set()
        self._refusals: set[bytes] = set()
        self._refused_timer: asyncio.TimerHandle | None = None
        self._misplaced = 0
        self._timer: asyncio.TimerHandle | None = None
        self._will_flush = False
        self._pipeline: Pipeline | None = None
        self._is_probed = False
        self._is_lost = asyncio.Event()
        self._can_probe = asyncio.Event()
        self._probes = 0
        self._last_heard = 0
        self._attempt = 0

    # -- what is subscribed

    def want(self, channel: bytes) -> None:
        """Subscribe a channel, now and whenever the connection is made again."""
        self._channels.add(channel)
        self._is_wanted.set()
        self._ask(channel, subscribe=True)

    @property
    def probe(self) -> bytes:
        """The channel of its own bell."""
        return self._probe

    def probe_by(self, channel: bytes) -> None:
        """Ring another channel from now on: the slot of the old one is not this shard's any more."""
        if channel == self._probe:
            return
        self._probe = channel
        if self._pipeline is not None:
            self._is_lost.set()  # slots have moved: subscribing all anew is rare enough, and sure
            self._can_probe.set()

    def forget(self, channel: bytes) -> None:
        """Unsubscribe it."""
        self._channels.discard(channel)
        self._ask(channel, subscribe=False)

    def _ask(self, channel: bytes, *, subscribe: bool) -> None:
        if self._pipeline is None:  # all is asked for when there is one
            return
        if self._asked.get(channel, subscribe) != subscribe:
            del self._asked[channel]  # neither has left
            return
        self._asked[channel] = subscribe
        if not self._will_flush:
            self._will_flush = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._will_flush = False
        if self._pipeline is None or self._pipeline.is_closing:
            return
        parts: list[bytes] = []
        while self._asked and len(self._unanswered) < MAX_UNANSWERED:
            channel = next(iter(self._asked))
            subscribe = self._asked.pop(channel)
            self._unanswered.append((channel, subscribe))
            parts += pack(1, _SUBSCRIBE if subscribe else _UNSUBSCRIBE, (channel,))
        if parts:
            self._pipeline.write([b"".join(parts)])

    # -- the connection

    async def run(self) -> None:
        """Keep connected as long as something is subscribed; its owner cancels it."""
        await self._is_wanted.wait()
        try:
            while True:
                if await self._connect():
                    why = await self._watch()
                    log.warning("doorbell.lost", shard=self.shard.name, why=why)
                self._disconnect()
                self._ears.misplaced()  # a replica may have taken its place
                telemetry.doorbell_reconnects.inc()
                await asyncio.sleep(self._backoff())
        finally:
            self._disconnect()

    def _backoff(self) -> float:
        first, longest = BACKOFF_SECONDS
        seconds: float = min(longest, first * 2**self._attempt)
        self._attempt = min(self._attempt + 1, 16)
        return seconds * random.uniform(0.5, 1)  # noqa: S311 - no secret

    async def _connect(self) -> bool:
        self._is_lost.clear()
        self._can_probe.clear()
        self._is_probed = bool(self._probe)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                self._pipeline = await Pipeline.connect(self.shard.pool, self._answered, self._lose)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            log.warning(
                "doorbell.unreachable", shard=self.shard.name, error=str(error) or type(error).__name__
            )
            return False
        if self._is_probed:
            self._ask(self._probe, subscribe=True)
        else:
            self._can_probe.set()
        for channel in self._channels:
            self._ask(channel, subscribe=True)
        return True

    def _disconnect(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._asked.clear()
        self._unanswered.clear()
        self._later.clear()
        if self._refused_timer is not None:
            self._refused_timer.cancel()
            self._refused_timer = None
        self._refusals.clear()

    def _lose(self, _: Exception) -> None:
        self._is_lost.set()
        self._can_probe.set()  # nobody need wait for that

    async def _watch(self) -> str:
        """Returns, with the reason, when the connection is of no more use."""
        if not await self._within(self._can_probe, self._probe_seconds):
            return self._deaf("no subscription was confirmed")
        while True:
            ringing = self._ring_once() if self._is_probed and not self._is_lost.is_set() else None
            if await self._within(self._is_lost, self._probe_seconds / 2):
                return "the connection ended"
            # Only what the store has taken by now can have been heard by then.
            was_rung = ringing is not None and ringing.done() and ringing.exception() is None
            if await self._within(self._is_lost, self._probe_seconds / 2):
                return "the connection ended"
            if was_rung and self._last_heard != self._probes:
                return self._deaf("it did not hear itself")

    def _ring_once(self) -> asyncio.Future[Any]:
        self._probes += 1
        ringing = self._ring(self._probe, b"%d" % self._probes)
        ringing.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved
        return ringing

    @staticmethod
    def _deaf(why: str) -> str:
        telemetry.doorbell_probes_failed.inc()
        return why

    @staticmethod
    async def _within(event: asyncio.Event, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True

    # -- what comes

    def _answered(self, replies: list[Any]) -> None:
        own = self._ears.own_bell
        try:
            for reply in replies:
                # The bells of this node itself come in thousands.
                if type(reply) is not list:
                    self._refused(reply)
                elif reply[0] != b"smessage":
                    self._told(reply[0], reply[1])
                elif reply[2] != own:
                    self._heard(reply[1], reply[2])
        except Exception as error:
            log.exception("doorbell.failed", shard=self.shard.name)
            self._lose(error)
        if self._asked and not self._will_flush:
            self._flush()

    def _heard(self, channel: bytes, payload: bytes) -> None:
        if channel == self._probe:
            self._last_heard = int(payload)
            self._attempt = 0
        else:
            self._ears.heard(channel, payload)

    def _told(self, what: bytes, channel: bytes) -> None:
        subscribe = what == b"ssubscribe"
        is_answer = bool(self._unanswered) and self._unanswered[0] == (channel, subscribe)
        if is_answer:
            self._unanswered.popleft()
        if not subscribe:
            if not is_answer:
                self._ask_later(channel)  # its slot is another's now
        elif channel == self._probe:
            self._is_probed = True
            self._can_probe.set()
        else:
            self._misplaced = 0
            self._ears.confirmed(channel)

    def _refused(self, reply: object) -> None:
        is_elsewhere = str(reply).partition(" ")[0] in _NOT_HERE_NOW
        if is_elsewhere and not self._unanswered:
            return  # to an unsubscribe: what the server said by itself as the slot moved was taken for it
        if not isinstance(reply, ReplyError) or not self._unanswered:
            raise TypeError("unable to go on; the store said what nobody asked for")
        channel, subscribe = self._unanswered.popleft()
        if not subscribe:
            return
        if is_elsewhere:
            self._ask_later(channel)
            return
        if self._refused_timer is None:  # one line for all of them
            log.error("doorbell.refused", shard=self.shard.name, error=str(reply))
            loop = asyncio.get_running_loop()
            self._refused_timer = loop.call_later(REFUSED_AGAIN_SECONDS, self._ask_refused)
        self._refusals.add(channel)
        if channel == self._probe:  # then it is for GATEWAY_POLL to find out
            self._is_probed = False
            self._can_probe.set()

    def _ask_refused(self) -> None:
        self._refused_timer = None
        channels, self._refusals = self._refusals, set()
        for channel in channels:
            if channel in self._channels or channel == self._probe:
                self._ask(channel, subscribe=True)

    def _ask_later(self, channel: bytes) -> None:
        """Have the servers looked up; if that moves the channel elsewhere it is forgotten here until then."""
        self._ears.misplaced()
        self._later.add(channel)
        if self._timer is None:
            first, longest = ASK_AGAIN_SECONDS
            delay = min(longest, first * 2**self._misplaced) * random.uniform(0.5, 1)  # noqa: S311 - as above
            self._misplaced = min(self._misplaced + 1, 16)
            self._timer = asyncio.get_running_loop().call_later(delay, self._ask_again)

    def _ask_again(self) -> None:
        self._timer = None
        channels, self._later = self._later, set()
        for channel in channels:
            if channel in self._channels or channel == self._probe:
                self._ask(channel, subscribe=True)
