"""Prometheus metrics of a service."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Metrics of one service, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.jobs = counter(
            "alphalayer_jobs",
            "Finished jobs by outcome: done, cancelled, or the error's code.",
            ["outcome"],
        )
        self.refused = counter(
            "alphalayer_refused",
            "Refused requests by reason: queue_full, rate_limited, busy.",
            ["reason"],
        )
        self.pictures = counter("alphalayer_pictures", "Stored images.")
        self.stage_seconds = histogram(
            "alphalayer_stage_seconds",
            "Seconds of a job's stages: load, text, inputs, sample, upscale, vae, decode, store.",
            ["stage"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )
        self.batch_jobs = histogram(
            "alphalayer_batch_jobs",
            "Jobs that are generated together.",
            buckets=(1, 2, 4, 8, 16, 32),
        )
        self.webhooks = counter(
            "alphalayer_webhooks",
            "Webhooks by outcome: delivered, retried, given_up.",
            ["outcome"],
        )
        self.engine_starts = counter(
            "alphalayer_engine_starts", "Starts of engine processes.", ["engine"]
        )
        self.engine_ready = gauge(
            "alphalayer_engine_ready", "1 while an engine process is ready.", ["engine"]
        )
        self.engine_memory = gauge(
            "alphalayer_engine_memory_bytes",
            "Memory that an engine uses on its device.",
            ["engine"],
        )
        self.queue_length = gauge("alphalayer_queue_length", "Waiting jobs.")
        self.pixel_queue_length = gauge(
            "alphalayer_pixel_queue_length",
            "Requests that wait for work on images in the service's process.",
        )
        self.pixel_memory = gauge(
            "alphalayer_pixel_memory_bytes",
            "Memory that running work on images is expected to need.",
        )
        self.queue_age = gauge("alphalayer_queue_age_seconds", "Age of the oldest waiting job.")
