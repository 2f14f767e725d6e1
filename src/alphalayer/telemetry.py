"""Logs and metrics: how they are set up, and every name that is used."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

log: Any = structlog.get_logger("alphalayer")


def set_up_logs(level: str, as_json: bool) -> None:
    """Send all logs, those of libraries too, to standard error: readable lines, or one JSON object each.

    Tracebacks are plain, without the values of variables: those hold keys and prompts.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


class Metrics:
    """Every metric of a service; one set a service, so that tests can have several."""

    def __init__(self):
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.jobs = Counter(
            "alphalayer_jobs",
            "Jobs that are over, by outcome: done, cancelled, or the error's code.",
            ["outcome"],
            **make,
        )
        self.refused = Counter(
            "alphalayer_refused",
            "Requests that were told to come back later, by reason: queue_full, rate_limited.",
            ["reason"],
            **make,
        )
        self.pictures = Counter("alphalayer_pictures", "Pictures stored.", **make)
        self.stage_seconds = Histogram(
            "alphalayer_stage_seconds",
            "Seconds of a job's stages: load, text, sample, vae, decode.",
            ["stage"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            **make,
        )
        self.batch_jobs = Histogram(
            "alphalayer_batch_jobs", "Jobs that are drawn together.", buckets=(1, 2, 4, 8, 16, 32), **make
        )
        self.webhooks = Counter(
            "alphalayer_webhooks", "Webhooks, by outcome: delivered, retried, given_up.", ["outcome"], **make
        )
        self.engine_starts = Counter("alphalayer_engine_starts", "Starts of engine processes.", ["engine"], **make)
        self.engine_ready = Gauge("alphalayer_engine_ready", "1 while an engine process is ready.", ["engine"], **make)
        self.engine_memory = Gauge(
            "alphalayer_engine_memory_bytes", "Memory that an engine holds on its device.", ["engine"], **make
        )
        self.queue_length = Gauge("alphalayer_queue_length", "Jobs that wait.", **make)
        self.queue_age = Gauge("alphalayer_queue_age_seconds", "How long the next job has waited.", **make)
