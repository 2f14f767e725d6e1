"""How long an engine may be silent, derived from the pace of its own steps."""

from __future__ import annotations

import time
from collections import OrderedDict

from alphalayer.core.job import JobProgress

USUAL_GAPS = 20.0
"""Longest silence, in the longest gap between two reports of the same work."""
SHORTEST_LIMIT_S = 60.0
"""Limit of work with short steps, which a busy machine may delay."""
REMEMBERED = 256
"""Kinds of work that are remembered, the latest ones."""
SAMPLE, DECODE = "sample", "decode"


class Pace:
    """Longest gaps between the reports of an engine, by stage and cost of a batch."""

    def __init__(self) -> None:
        self._gaps: OrderedDict[tuple[str, float], float] = OrderedDict()

    def record(self, work: tuple[str, float], seconds: float) -> None:
        """Record the time between two reports of a stage of a batch."""
        self._gaps[work] = max(seconds, self._gaps.get(work, 0.0))
        self._gaps.move_to_end(work)
        if len(self._gaps) > REMEMBERED:
            self._gaps.popitem(last=False)

    def limit_s(self, work: tuple[str, float], silence_limit_s: float) -> float:
        """Return how long work may be silent; `silence_limit_s` if it is unknown."""
        if work not in self._gaps:
            return silence_limit_s
        return min(silence_limit_s, max(SHORTEST_LIMIT_S, USUAL_GAPS * self._gaps[work]))


class BatchPace:
    """Reports of one batch.

    Its steps are limited by those before. Its decode is limited by whole decodes of equal cost,
    because the layers of one decode differ. Other stages have no pace: a load may read gigabytes,
    the first step may compile, and a bucket may be slow.
    """

    def __init__(self, pace: Pace, cost: float):
        self._pace = pace
        self._cost = cost
        self._progress = JobProgress()
        self._reported_at = 0.0
        self._longest_s = 0.0
        """Longest gap of the decode so far."""

    def report(self, progress: JobProgress) -> None:
        """Record the time since the last report."""
        now = time.monotonic()
        stage, gap_s = self._progress.stage, now - self._reported_at
        if stage == DECODE:
            self._longest_s = max(self._longest_s, gap_s)
            if progress.stage != DECODE:
                self._pace.record((DECODE, self._cost), self._longest_s)
                self._longest_s = 0.0
        elif stage == progress.stage == SAMPLE:
            self._pace.record((SAMPLE, self._cost), gap_s)
        self._progress, self._reported_at = progress, now

    def limit_s(self, silence_limit_s: float) -> float:
        """Return how long the engine may be silent now."""
        stage = self._progress.stage
        if stage == DECODE or (stage == SAMPLE and self._progress.step):
            return self._pace.limit_s((stage, self._cost), silence_limit_s)
        return silence_limit_s
