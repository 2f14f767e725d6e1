"""Runs along the last part of a schedule, from a latent with some noise.

An image that is enlarged or changed gets the noise of a middle level, and is denoised from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from alphalayer.engine.sampling.levels import (
    add_restarts,
    ddim_sigmas,
    ddim_timesteps,
    dpm_fast_between,
    evenly_spaced,
    sigmas_in_time,
)
from alphalayer.engine.sampling.schedules import LevelsOf, SigmaTable, sigmas_for


class Levels(NamedTuple):
    """Noise levels of a run."""

    sigmas: Tensor
    """Levels of the steps, float32, on the CPU."""
    start: float
    """Level of the noise in the first latent."""
    span: Tensor
    """Levels of the whole schedule, which a Brownian path spans."""

    @classmethod
    def whole(cls, sigmas: Tensor) -> Levels:
        """Return the levels of a run along a whole schedule."""
        return cls(sigmas, float(sigmas[0]), sigmas)


def last_levels(
    levels: LevelsOf, scheduler: str, total: int, steps: int, table: SigmaTable
) -> Levels:
    """Return the last steps of a schedule, and at least one.

    Args:
        levels: Function that returns the schedule.
        scheduler: Name of the schedule.
        total: Steps of the whole schedule.
        steps: Steps to keep.
        table: Noise levels that the model was trained on.
    """
    span = levels(scheduler, total, table)
    # schedules over fewer training steps may have fewer levels
    sigmas = span[min(total - steps, len(span) - 2) :]
    return Levels(sigmas, float(sigmas[0]), span)


def last_restart_levels(
    _levels: LevelsOf, scheduler: str, total: int, steps: int, table: SigmaTable
) -> Levels:
    """Return the last steps of a schedule, with the restarts of their number."""
    last = last_levels(sigmas_for, scheduler, total, steps, table)
    return last._replace(sigmas=add_restarts(last.sigmas))


def last_dpm_fast_levels(
    _levels: LevelsOf, scheduler: str, total: int, steps: int, table: SigmaTable
) -> Levels:
    """Return levels of DPM-Solver-fast between the ends of the last steps."""
    return _between_last_ends(dpm_fast_between, scheduler, total, steps, table)


def last_dpm_adaptive_levels(
    _levels: LevelsOf, scheduler: str, total: int, steps: int, table: SigmaTable
) -> Levels:
    """Return levels of DPM adaptive between the ends of the last steps."""
    return _between_last_ends(evenly_spaced, scheduler, total, steps, table)


def _between_last_ends(
    between: Callable[[int, float, float], Tensor],
    scheduler: str,
    total: int,
    steps: int,
    table: SigmaTable,
) -> Levels:
    last = last_levels(sigmas_for, scheduler, total, steps, table)
    low = float(last.sigmas[-2]) if steps > 1 else table.sigma_min
    if low >= last.start:  # the last step of some schedules begins at the lowest level
        low = last.start / 2
    return last._replace(sigmas=between(steps, last.start, low))


def last_ddim_levels(
    _levels: LevelsOf, scheduler: str, total: int, steps: int, table: SigmaTable
) -> Levels:
    """Return the levels below the one that the latent is noised to.

    Of `steps` levels the first is that of the noise, and the last has no step of its own. So there
    are two steps fewer, but at least one.

    Source: AUTOMATIC1111, the timestep samplers.
    """
    span = ddim_sigmas(scheduler, total, table)
    first = max(len(span) - max(steps - 1, 2), 0)
    return Levels(span[first:], float(span[max(first - 1, 0)]), span)


def last_unipc_levels(
    levels: LevelsOf, scheduler: str, total: int, steps: int, table: SigmaTable
) -> Levels:
    """Return levels spaced evenly in time, one more than `last_ddim_levels`."""
    last = last_ddim_levels(levels, scheduler, total, steps, table)
    highest = ddim_timesteps(total, table)[len(last.sigmas) - 1]
    start = float(highest + 1) / len(table)
    return last._replace(sigmas=sigmas_in_time(start, len(last.sigmas), table))
