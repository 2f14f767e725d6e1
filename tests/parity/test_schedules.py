"""Noise levels: the training table, the six schedules and the stop-at levels.

The references are published numbers, the schedulers of diffusers, and scipy.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from scipy import integrate, special, stats

from alphalayer.core.request import SCHEDULERS
from alphalayer.engine.sampling.schedules import SigmaTable, sigmas_for

TABLE = SigmaTable.from_betas()
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
KARRAS_20 = [
    14.614643, 11.7253685, 9.340202, 7.383618, 5.7894135, 4.4998345, 3.4647474, 2.640841,
    1.9909163, 1.483211, 1.0907861, 0.79094607, 0.5647216, 0.39638984, 0.27303797, 0.184168,
    0.12134143, 0.077860065, 0.04848137, 0.029167177, 0.0,
]  # fmt: skip
KARRAS_20_TIMESTEPS = [
    999,
    962,
    921,
    876,
    827,
    772,
    710,
    640,
    561,
    474,
    380,
    285,
    197,
    123,
    69,
    35,
    15,
    6,
    2,
    0,
]


def test_table_has_the_published_ends():
    assert TABLE.sigma_min == pytest.approx(0.029167159, rel=1e-7)
    assert TABLE.sigma_max == pytest.approx(14.614641190, rel=1e-7)
    assert len(TABLE) == 1000


def test_table_equals_diffusers():
    # diffusers multiplies the alphas in float32: the error is at most 1.3e-5
    reference = EulerDiscreteScheduler(**BETAS).alphas_cumprod
    expected = ((1 - reference) / reference) ** 0.5
    torch.testing.assert_close(TABLE.sigmas, expected, rtol=2e-5, atol=0)


def test_karras_levels_equal_published_levels():
    # float32 powers: some units in the last place
    np.testing.assert_allclose(sigmas_for("Karras", 20, TABLE), KARRAS_20, rtol=5e-7, atol=0)


def test_karras_levels_have_the_published_timesteps():
    levels = sigmas_for("Karras", 20, TABLE)[:-1]
    assert [TABLE.timestep(float(sigma)) for sigma in levels] == KARRAS_20_TIMESTEPS


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 150])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedule_falls_from_the_highest_level_to_zero(scheduler: str, steps: int):
    sigmas = sigmas_for(scheduler, steps, TABLE)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (steps + 1,)
    assert sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    # to float32 rounding
    assert float(sigmas[0]) == pytest.approx(TABLE.sigma_max, rel=1e-6)


@pytest.mark.parametrize("steps", [5, 20, 33])
@pytest.mark.parametrize(
    ("scheduler", "option"),
    [
        ("Karras", "use_karras_sigmas"),
        ("Exponential", "use_exponential_sigmas"),
        ("Beta", "use_beta_sigmas"),
    ],
)
def test_schedule_equals_diffusers(scheduler: str, option: str, steps: int):
    reference = EulerDiscreteScheduler(**BETAS, **{option: True})
    reference.set_timesteps(steps)
    # their ends are 1.3e-5 off (see above)
    torch.testing.assert_close(
        sigmas_for(scheduler, steps, TABLE), reference.sigmas, rtol=3e-5, atol=0
    )


# step counts that hit whole training steps, where diffusers' linear interpolation does not matter
@pytest.mark.parametrize("steps", [2, 4, 10, 28])
def test_normal_equals_diffusers_linspace(steps: int):
    reference = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    reference.set_timesteps(steps)
    torch.testing.assert_close(
        sigmas_for("Normal", steps, TABLE), reference.sigmas, rtol=3e-5, atol=0
    )


@pytest.mark.parametrize("steps", [3, 9, 27])
def test_sgm_uniform_is_normal_without_the_lowest_level(steps: int):
    reference = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    reference.set_timesteps(steps + 1)
    expected = torch.cat([reference.sigmas[:-2], torch.zeros(1)])
    torch.testing.assert_close(sigmas_for("SGM Uniform", steps, TABLE), expected, rtol=3e-5, atol=0)


# k-diffusion's formulas, written out, for one step more; then all but the last level, and 0
def _karras(n: int) -> np.ndarray:
    ends = np.array([TABLE.sigma_max, TABLE.sigma_min]) ** (1 / 7)
    return (ends[0] + np.linspace(0, 1, n) * (ends[1] - ends[0])) ** 7


def _exponential(n: int) -> np.ndarray:
    return np.exp(np.linspace(math.log(TABLE.sigma_max), math.log(TABLE.sigma_min), n))


@pytest.mark.parametrize("steps", [1, 2, 20, 150])
@pytest.mark.parametrize(
    ("scheduler", "levels"), [("Karras", _karras), ("Exponential", _exponential)]
)
def test_skip_lowest_takes_the_schedule_of_one_step_more(scheduler: str, levels, steps: int):
    expected = [*levels(steps + 1)[:-1], 0.0]
    # float32 powers and exponentials
    np.testing.assert_allclose(
        sigmas_for(scheduler, steps, TABLE, skip_lowest=True), expected, rtol=2e-6, atol=0
    )


def test_normal_interpolates_log_sigma_between_training_steps():
    timesteps = np.linspace(999, 0, 17)
    expected = np.exp(np.interp(timesteps, np.arange(1000), np.log(TABLE.sigmas.double().numpy())))
    # logarithms and exponentials in float32
    np.testing.assert_allclose(sigmas_for("Normal", 17, TABLE)[:-1], expected, rtol=2e-6)


@pytest.mark.parametrize("steps", [6, 20, 30])
def test_simple_takes_every_nth_level_from_the_top(steps: int):
    expected = [float(TABLE.sigmas[999 - int(i * 1000 / steps)]) for i in range(steps)]
    assert sigmas_for("Simple", steps, TABLE)[:-1].tolist() == expected


@pytest.mark.parametrize("table", [TABLE, SigmaTable.from_betas(zero_snr=True)])
def test_beta_levels_equal_scipys_quantiles(table: SigmaTable):
    """Compare every float32 level, for twice the step counts that a request may have."""
    for steps in range(1, 301):
        quantiles = stats.beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)
        expected = table.sigma_min + quantiles * (table.sigma_max - table.sigma_min)
        levels = sigmas_for("Beta", steps, table)[:-1]
        assert torch.equal(levels, torch.from_numpy(expected).float()), steps


def test_beta_levels_are_quantiles_of_the_density():
    """Integrate the density of Beta(0.6, 0.6) up to each quantile."""
    quantiles = (sigmas_for("Beta", 9, TABLE)[1:-2].double().numpy() - TABLE.sigma_min) / (
        TABLE.sigma_max - TABLE.sigma_min
    )

    def density(x):
        return (x * (1 - x)) ** -0.4 / special.beta(0.6, 0.6)

    probabilities = [integrate.quad(density, 0, quantile)[0] for quantile in quantiles]
    # quadrature of a density that is infinite at 0
    np.testing.assert_allclose(probabilities, 1 - np.linspace(0, 1, 9)[1:-1], atol=1e-5)


# --- zero terminal signal-to-noise ratio


def test_zero_snr_table_has_the_published_ends():
    table = SigmaTable.from_betas(zero_snr=True)
    assert table.sigma_max == pytest.approx(4518.76, abs=0.005)
    # The published number was computed in float32, where 1 - alpha_bar keeps four digits. Rescaling
    # does not change the first level.
    assert table.sigma_min == pytest.approx(0.0291655, rel=1e-4)
    assert table.sigma_min == pytest.approx(TABLE.sigma_min, rel=1e-6)


def test_zero_snr_table_equals_diffusers():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)[:-1]
    # float64 on both sides; near the end 1 - alpha_bar cancels
    torch.testing.assert_close(
        SigmaTable.from_betas(zero_snr=True).sigmas[:-1],
        ((1 - alpha_bar) / alpha_bar).sqrt().float(),
        rtol=1e-6,
        atol=0,
    )


def test_linear_betas_equal_diffusers():
    table = SigmaTable.from_betas(0.0001, 0.02, "linear")
    reference = EulerDiscreteScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
    ).alphas_cumprod
    # here the float32 products are further off: alpha_bar falls to 4e-5
    torch.testing.assert_close(
        table.sigmas, ((1 - reference) / reference) ** 0.5, rtol=1e-4, atol=0
    )


# --- timesteps and levels


def test_timesteps_and_levels_are_inverse():
    for timestep in (0, 1, 500, 998, 999):
        assert TABLE.timestep(TABLE.sigma(timestep)) == timestep


def test_timesteps_beyond_the_table_are_clamped():
    assert TABLE.timestep(1e6) == 999
    assert TABLE.timestep(1e-6) == 0
    assert TABLE.sigma(5000) == pytest.approx(TABLE.sigma_max)
    assert TABLE.sigma(-3) == pytest.approx(TABLE.sigma_min)


# share of the schedule, level at which the patch is removed, patched steps of 20 on Karras levels
@pytest.mark.parametrize(
    ("part", "level", "patched"), [(0.25, 4.08608, 6), (0.5, 1.61558, 9), (0.75, 0.69515, 12)]
)
def test_stop_at_levels_equal_published_levels(part: float, level: float, patched: int):
    sigma = TABLE.sigma((1 - part) * 999)
    assert sigma == pytest.approx(level, abs=1e-5)
    assert int((sigmas_for("Karras", 20, TABLE) >= sigma).sum()) == patched
