"""Prometheus metrics of a service."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Metrics of one service, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.jobs = Counter(
            "alphalayer_jobs",
            "Finished jobs by outcome: done, cancelled, or the error's code.",
            ["outcome"],
            **options,
        )
        self.refused = Counter(
            "alphalayer_refused",
            "Refused requests by reason: queue_full, rate_limited, busy.",
            ["reason"],
            **options,
        )
        self.pictures = Counter("alphalayer_pictures", "Stored images.", **options)
        self.stage_seconds = Histogram(
            "alphalayer_stage_seconds",
            "Seconds of a job's stages: load, text, inputs, sample, vae, decode, store.",
            ["stage"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            **options,
        )
        self.batch_jobs = Histogram(
            "alphalayer_batch_jobs",
            "Jobs that are generated together.",
            buckets=(1, 2, 4, 8, 16, 32),
            **options,
        )
        self.webhooks = Counter(
            "alphalayer_webhooks",
            "Webhooks by outcome: delivered, retried, given_up.",
            ["outcome"],
            **options,
        )
        self.engine_starts = Counter(
            "alphalayer_engine_starts", "Starts of engine processes.", ["engine"], **options
        )
        self.engine_ready = Gauge(
            "alphalayer_engine_ready", "1 while an engine process is ready.", ["engine"], **options
        )
        self.engine_memory = Gauge(
            "alphalayer_engine_memory_bytes",
            "Memory that an engine uses on its device.",
            ["engine"],
            **options,
        )
        self.queue_length = Gauge("alphalayer_queue_length", "Waiting jobs.", **options)
        self.pixel_queue_length = Gauge(
            "alphalayer_pixel_queue_length",
            "Requests that wait for work on images in the service's process.",
            **options,
        )
        self.pixel_memory = Gauge(
            "alphalayer_pixel_memory_bytes",
            "Memory that running work on images is expected to need.",
            **options,
        )
        self.queue_age = Gauge(
            "alphalayer_queue_age_seconds", "Age of the oldest waiting job.", **options
        )
