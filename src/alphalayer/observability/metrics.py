"""Prometheus metrics of a service."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


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
            "alphalayer_batch_jobs",
            "Jobs that are drawn together.",
            buckets=(1, 2, 4, 8, 16, 32),
            **make,
        )
        self.webhooks = Counter(
            "alphalayer_webhooks",
            "Webhooks, by outcome: delivered, retried, given_up.",
            ["outcome"],
            **make,
        )
        self.engine_starts = Counter(
            "alphalayer_engine_starts", "Starts of engine processes.", ["engine"], **make
        )
        self.engine_ready = Gauge(
            "alphalayer_engine_ready", "1 while an engine process is ready.", ["engine"], **make
        )
        self.engine_memory = Gauge(
            "alphalayer_engine_memory_bytes",
            "Memory that an engine holds on its device.",
            ["engine"],
            **make,
        )
        self.queue_length = Gauge("alphalayer_queue_length", "Jobs that wait.", **make)
        self.queue_age = Gauge(
            "alphalayer_queue_age_seconds", "How long the next job has waited.", **make
        )
