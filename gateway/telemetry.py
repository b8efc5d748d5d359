"""Every metric with its help text, and how logs are set up.

Names: ``gateway_<noun>_<unit>[_total]``; labels from closed sets only.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.config import LogFormat, LogLevel
from gateway.core.model import EndReason, ErrorCode, ResyncReason

if TYPE_CHECKING:
    from structlog.typing import Processor

registry = CollectorRegistry()

CARRIERS = ("websocket", "sse", "long-poll", "sdk-websocket", "http")

turns_ended = Counter(
    "gateway_turns_ended_total",
    "Turns that this node ended, by reason. error and interrupted are what users see as lost answers.",
    ("reason",),
    registry=registry,
)
running_turns = Gauge(
    "gateway_running_turns",
    "Turns that this node is reading from the backend now.",
    registry=registry,
)
buffered_bytes = Gauge(
    "gateway_buffered_bytes",
    "Bytes of running turns that this node holds; at GATEWAY_MAX_BUFFER sends are refused.",
    registry=registry,
)
attached_subscribers = Gauge(
    "gateway_attached_subscribers",
    "Attached subscribers by carrier.",
    ("carrier",),
    registry=registry,
)
open_connections = Gauge(
    "gateway_open_connections",
    "Sockets, event streams, waiting polls and turns told over plain HTTP that are open, by carrier.",
    ("carrier",),
    registry=registry,
)
refused_connections = Counter(
    "gateway_refused_connections_total",
    "Connections that were not let in: rate-limited is GATEWAY_MAX_CONNECTIONS, draining a node that stops.",
    ("reason",),
    registry=registry,
)
goaways = Counter(
    "gateway_goaways_total",
    "Connections that were open when the node began to stop, and were told to go to another.",
    registry=registry,
)
sends = Counter(
    "gateway_sends_total",
    "Sends by what became of them: accepted, duplicate, or the code they were refused with.",
    ("result",),
    registry=registry,
)
cancels = Counter(
    "gateway_cancels_total",
    "Cancelled turns by result.",
    ("result",),
    registry=registry,
)
resumes = Counter(
    "gateway_resumes_total",
    "Attaches that continued from a cursor or joined a turn that had begun, by carrier.",
    ("carrier",),
    registry=registry,
)
resyncs = Counter(
    "gateway_resyncs_total",
    "Clients that could not continue from where they were, by reason. Should be near zero.",
    ("reason",),
    registry=registry,
)
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
first_chunk_seconds = Histogram(
    "gateway_first_chunk_seconds",
    "From the accepted send to the backend's first event.",
    buckets=_SECONDS,
    registry=registry,
)
append_seconds = Histogram(
    "gateway_append_seconds",
    "One append to the journal, as a turn waits for it. High: look at the store.",
    buckets=_SECONDS,
    registry=registry,
)
cancel_seconds = Histogram(
    "gateway_cancel_close_seconds",
    "From a cancel to the backend's connection being closed.",
    buckets=_SECONDS,
    registry=registry,
)
repaired_records = Counter(
    "gateway_repaired_records_total",
    "Records that a failover lost and a producer wrote again. Above zero: the store loses writes.",
    registry=registry,
)
renewed_epochs = Counter(
    "gateway_renewed_epochs_total",
    "Sessions that got a new epoch because records were lost for good; their clients got resync.",
    registry=registry,
)
refused_origins = Counter(
    "gateway_refused_origins_total",
    "Requests of pages that GATEWAY_ORIGINS does not name.",
    registry=registry,
)
bells = Counter(
    "gateway_bells_total",
    "Bells that told this node of what another did in a session that somebody here waits for.",
    registry=registry,
)
doorbell_reconnects = Counter(
    "gateway_doorbell_reconnects_total",
    "Times that the connection for bells had to be made again; meanwhile records come late, by GATEWAY_POLL.",
    registry=registry,
)
doorbell_probes_failed = Counter(
    "gateway_doorbell_probes_failed_total",
    "Times that the connection for bells was open and heard nothing: look at what is between here and Redis.",
    registry=registry,
)
pages_read = Counter(
    "gateway_pages_read_total",
    "Pages of the journal read for clients that catch up.",
    registry=registry,
)

for _reason in (*EndReason, "given-up"):
    turns_ended.labels(reason=_reason)
for _carrier in CARRIERS:
    attached_subscribers.labels(carrier=_carrier)
    resumes.labels(carrier=_carrier)
    open_connections.labels(carrier=_carrier)
for _refused in (ErrorCode.RATE_LIMITED, ErrorCode.DRAINING):
    refused_connections.labels(reason=_refused)
for _resync in ResyncReason:
    resyncs.labels(reason=_resync)


def metrics_table() -> str:
    """The metrics as a Markdown table."""
    rows = ["| metric | type | |", "|---|---|---|"]
    rows += [
        f"| `{family.name + ('_total' if family.type == 'counter' else '')}` "
        f"| {family.type} | {family.documentation} |"
        for family in registry.collect()
    ]
    return "\n".join(rows)


def set_up_logging(level: LogLevel, form: LogFormat) -> None:
    """One line per event on standard error: JSON, or coloured on a terminal.

    The lines of libraries (aiohttp, asyncio) take the same way.
    """
    to_console = form is LogFormat.CONSOLE or (form is LogFormat.AUTO and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor] = (
        # Its own way shows the local variables of each frame: cookies, and what people write.
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if to_console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # One line per request would bury the one line per turn; the events that matter are logged by us.
    logging.getLogger("aiohttp.server").addFilter(_is_no_malformed_request)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def _is_no_malformed_request(record: logging.LogRecord) -> bool:
    """What aiohttp says of one is an error with a traceback, and holds the header: a cookie, a token."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
