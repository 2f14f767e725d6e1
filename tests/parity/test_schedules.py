"""Noise levels: the training table, the schedules and the stop-at levels.

The references are published numbers, the schedulers of diffusers, and scipy.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from scipy import integrate, special, stats

from alphalayer.core.samplers import SCHEDULERS
from alphalayer.engine.sampling.samplers import SAMPLERS, count_steps
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

# levels at which Forge called the network
SGM = [
    14.6146402, 8.3071709, 5.0924082, 3.325069, 2.2797306,
    1.6155803, 1.1628646, 0.8318837, 0.5711889, 0.3437048,
]  # fmt: skip


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
    # a stride of whole training steps, from the second lowest level up
    expected = len(range(1, 1000, 1000 // steps)) if scheduler == "DDIM" else steps
    assert sigmas.shape == (expected + 1,)
    assert float(sigmas[-1]) == (pytest.approx(TABLE.sigma_min) if scheduler == "KL Optimal" else 0)
    assert (sigmas[1:] < sigmas[:-1]).all()
    if scheduler != "DDIM":
        # published levels have three decimals, others float32 rounding
        tolerance = 5e-5 if scheduler.startswith("Align") else 1e-6
        assert float(sigmas[0]) == pytest.approx(TABLE.sigma_max, rel=tolerance)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "levels"),
    [
        ("Euler", "Normal", [14.6146402, 4.086081, 1.6155803, 0.6951495, 0.0291672]),
        ("Euler", "Uniform", [14.6146402, 4.086081, 1.6155803, 0.6951495, 0.0291672]),
        ("LCM", "Karras", [14.6146431, 5.8760762, 2.0609314, 0.6008112, 0.1344508]),
        ("DDIM", "Karras", [5.1344309, 2.2928538, 1.1682159, 0.5740503]),
        ("Euler", "SGM Uniform", SGM),
        ("LCM", "Simple", [14.6146421, 6.1374612, 3.068943, 1.6128861, 0.9513955, 0.5223334]),
    ],
)
def test_levels_of_a_sampler_are_those_of_forge(sampler: str, scheduler: str, levels: list[float]):
    steps = 5 if sampler == "DDIM" else len(levels)
    sigmas = SAMPLERS[sampler].levels(scheduler, steps, TABLE)
    # seven decimals of float32; the other ends of LCM's table are rounded elsewhere
    tolerance = 1e-6 if sampler == "LCM" else 1.2e-7
    np.testing.assert_allclose(sigmas[: len(levels)], levels, rtol=tolerance, atol=5e-8)


def test_unipc_levels_are_those_of_forge():
    # published with three decimals
    sigmas = SAMPLERS["UniPC"].levels("Karras", 5, TABLE)
    np.testing.assert_allclose(sigmas, [14.615, 5.092, 2.280, 1.163, 0.571, 0.029], atol=5.1e-4)


@pytest.mark.parametrize(
    ("name", "steps", "calls"),
    # Stable Diffusion's stride is a whole number: 1000 // 7 = 142 gives 8 training steps
    [("DDIM", 5, 4), ("DDIM", 7, 7), ("DDIM", 1, 1), ("UniPC", 5, 5), ("UniPC", 7, 8)],
)
def test_timestep_samplers_have_the_steps_of_forge(name: str, steps: int, calls: int):
    assert count_steps(SAMPLERS[name].levels("Karras", steps, TABLE)) == calls


@pytest.mark.parametrize(("steps", "rises"), [(19, 0), (20, 1), (35, 1), (36, 2), (150, 2)])
def test_restart_repeats_a_part_of_its_steps(steps: int, rises: int):
    sigmas = SAMPLERS["Restart"].levels("Karras", steps, TABLE)
    jumps = [(a, b) for a, b in pairwise(sigmas.tolist()) if b > a]
    assert len(jumps) == rises
    assert count_steps(sigmas) == steps
    for low, high in jumps:
        assert low == pytest.approx(0.1, rel=0.5)
        assert high == pytest.approx(2, rel=0.5)


@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_turbo_equals_diffusers_trailing(steps: int):
    reference = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    reference.set_timesteps(steps)
    torch.testing.assert_close(
        sigmas_for("Turbo", steps, TABLE), reference.sigmas, rtol=3e-5, atol=0
    )


def test_kl_optimal_is_even_in_arctan():
    sigmas = sigmas_for("KL Optimal", 7, TABLE).double().numpy()
    expected = np.linspace(math.atan(TABLE.sigma_max), math.atan(TABLE.sigma_min), 8)
    np.testing.assert_allclose(np.arctan(sigmas), expected, atol=1e-6)


def test_polyexponential_equals_exponential():
    torch.testing.assert_close(
        sigmas_for("Polyexponential", 9, TABLE),
        sigmas_for("Exponential", 9, TABLE),
        rtol=2e-6,
        atol=0,
    )


def test_align_your_steps_interpolates_log_sigma():
    published = sigmas_for("Align Your Steps", 11, TABLE).double().numpy()
    assert published[1:4].tolist() == pytest.approx([6.315, 3.771, 2.181], rel=1e-7)
    # of 21 levels every second one is published, and the others are geometric means
    levels = sigmas_for("Align Your Steps", 21, TABLE).double().numpy()[:-1]
    np.testing.assert_allclose(levels[::2], published[:-1], rtol=1e-6)
    np.testing.assert_allclose(levels[1::2], np.sqrt(published[:-2] * published[1:-1]), rtol=1e-6)
    assert sigmas_for("Align Your Steps 32", 32, TABLE)[-2] == pytest.approx(0.015)
    assert sigmas_for("Align Your Steps GITS", 11, TABLE)[1] == pytest.approx(4.734)


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
    # as the highest level, Forge's own
    assert table.sigma_min == pytest.approx(0.0291675, abs=5e-8)
    # Rescaling does not change the first level. In float32 1 - alpha_bar keeps four digits.
    assert table.sigma_min == pytest.approx(TABLE.sigma_min, rel=2e-5)


def test_zero_snr_table_equals_diffusers():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)[:-1]
    # float32 here: at both ends digits cancel
    torch.testing.assert_close(
        SigmaTable.from_betas(zero_snr=True).sigmas[:-1],
        ((1 - alpha_bar) / alpha_bar).sqrt().float(),
        rtol=2e-5,
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
