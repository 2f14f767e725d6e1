"""The samplers against independent implementations, in float32, with the same noise.

The references are the schedulers of diffusers. For the samplers that it lacks they are the updates
of the papers, in float64, or the exact path of a Gaussian. The denoiser is a small random network
of latent and noise level, which is far from linear.
"""

from __future__ import annotations

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from tests.support.transfers import Transfers

from alphalayer.core import samplers as names
from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.sampling.brownian_tree import BrownianNoise
from alphalayer.engine.sampling.multistep import _mean_of_uneven_steps
from alphalayer.engine.sampling.run import Run
from alphalayer.engine.sampling.samplers import (
    SAMPLERS,
    brownian_intervals,
    count_steps,
    sample,
)
from alphalayer.engine.sampling.schedules import SCHEDULES, SigmaTable, sigmas_for

SHAPE = (2, 4, 6, 5)
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
TABLE = SigmaTable.from_betas()
ON_GIVEN_LEVELS = [name for name in SAMPLERS if name != names.ADAPTIVE]
"""Samplers with the levels that they are called with. DPM adaptive reads errors instead."""
# the clean latent is of size 1, so this is absolute and relative at once
TOLERANCE = {"rtol": 0, "atol": 1e-4}

_generator = torch.Generator().manual_seed(0)
_IN, _OUT, _TIME = (
    torch.randn(size, generator=_generator, dtype=torch.float64)
    for size in ((4, 16), (16, 4), (16,))
)


def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Predict a clean latent in about [-1, 1], in the dtype of `x`.

    The denoiser is a network of two layers over the channels of each cell.
    """
    projected = torch.einsum("bchw,cd->bdhw", x / math.sqrt(sigma**2 + 1), _IN.to(x.dtype))
    hidden = torch.tanh(projected + (math.log(sigma) * _TIME.to(x.dtype))[:, None, None])
    return torch.tanh(torch.einsum("bdhw,dc->bchw", hidden, _OUT.to(x.dtype)) / 2)


START = torch.randn(SHAPE, generator=_generator)


class RecordedNoise:
    """Noise of its own generator, recorded in the order of the requests."""

    def __init__(self):
        self.samples: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, sigma: float, following: float) -> torch.Tensor:
        self.samples.append(torch.randn(SHAPE, generator=self._generator))
        return self.samples[-1]


def make_run(denoise, noise, on_step=lambda *_: None, eta: float = 0.0) -> Run:
    """Return a run without guidance, where CFG++ is DDIM."""
    last: list[torch.Tensor] = []

    def remember(x: torch.Tensor, sigma: float) -> torch.Tensor:
        last[:] = [denoise(x, sigma)]
        return last[0]

    return Run(remember, noise, on_step, lambda: last[0], eta)


def levels_of(name: str, steps: int) -> torch.Tensor:
    return SAMPLERS[name].levels("Karras", steps, TABLE)


def run_sampler(name: str, sigmas: torch.Tensor, noise=None, eta=None) -> torch.Tensor:
    """Return our result from the common start, and check the calls of `on_step`."""
    completed: list[int] = []
    last: list[torch.Tensor] = []
    sampler = SAMPLERS[name]

    def on_step(step: int, x: torch.Tensor, clean: torch.Tensor) -> None:
        completed.append(step)
        last[:] = [x]
        assert clean.shape == SHAPE

    run = make_run(denoise, noise or _no_noise, on_step, sampler.choose_eta(eta))
    result = sample(name, run, START * sampler.noise_scale(float(sigmas[0])), sigmas)
    # DPM fast reports after each call but the inner ones of a step, DPM adaptive by the noise
    if name not in ("DPM fast", "DPM adaptive"):
        assert completed == list(range(1, count_steps(sigmas) + 1))
    assert completed[-1] == count_steps(sigmas)
    if sampler.preserves_variance:
        last[0] = last[0] / math.sqrt(float(sigmas[-1]) ** 2 + 1)
    assert torch.equal(last[0], result)
    return result


def _no_noise(sigma: float, following: float) -> torch.Tensor:
    raise AssertionError("this sampler has no noise")


def _vp_multistep(scheduler, noises: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Drive a diffusers scheduler of the variance-preserving frame with the denoiser."""
    x = START * scheduler.sigmas[0] / (scheduler.sigmas[0] ** 2 + 1).sqrt()
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        noisy = x * math.sqrt(sigma**2 + 1)
        epsilon = (noisy - denoise(noisy, sigma)) / sigma
        noise = (
            {"variance_noise": noises[i] if i < len(noises) else torch.zeros(SHAPE)}
            if noises is not None
            else {}
        )
        x = scheduler.step(epsilon, timestep, x, return_dict=False, **noise)[0]
    return x


def _ve(scheduler, generator: torch.Generator | None = None) -> torch.Tensor:
    """Drive a diffusers scheduler of the variance-exploding frame with the denoiser."""
    x = START * scheduler.sigmas[0]
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, timestep)  # else the one of LMS warns
        sigma = float(scheduler.sigmas[i])
        options = {"generator": generator} if generator else {}
        x = scheduler.step(
            (x - denoise(x, sigma)) / sigma, timestep, x, return_dict=False, **options
        )[0]
    return x


def _dpm(**options) -> diffusers.DPMSolverMultistepScheduler:
    return diffusers.DPMSolverMultistepScheduler(
        **BETAS, solver_type="midpoint", final_sigmas_type="zero", use_karras_sigmas=True, **options
    )


def test_samplers_of_engine_and_requests_agree():
    assert set(SAMPLERS) == set(names.SAMPLERS)
    assert set(SCHEDULES) == set(names.SCHEDULERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_without_eta_ignore_it(name: str):
    sigmas = levels_of(name, 6)
    sampled = [run_sampler(name, sigmas, RecordedNoise(), eta) for eta in (0.0, 1.0)]
    assert torch.equal(*sampled) == (name in names.WITHOUT_ETA)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_dpmpp_2m_sde_equals_diffusers(steps: int):
    scheduler = _dpm(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(steps)
    noise = RecordedNoise()
    result = run_sampler("DPM++ 2M SDE", scheduler.sigmas, noise)
    torch.testing.assert_close(result, _vp_multistep(scheduler, noise.samples), **TOLERANCE)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_dpmpp_2m_equals_diffusers(steps: int):
    scheduler = _dpm(algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(
        run_sampler("DPM++ 2M", scheduler.sigmas), _vp_multistep(scheduler), **TOLERANCE
    )


@pytest.mark.parametrize("steps", [3, 4, 8, 20])
def test_dpmpp_3m_sde_equals_the_published_update(steps: int):
    """Compare with the third-order multistep update of DPM-Solver++ in float64.

    The SDE with eta 1 has twice the step in the phi functions. In half-log-SNR lambda = -log sigma,
    with K(h) = exp(-2h): x' = K x + phi1 D0 + phi2 D1 - phi3 D2. Divided differences come from
    Newton's table instead of the ratios of step lengths.
    """
    sigmas = sigmas_for("Karras", steps, TABLE)
    noise = RecordedNoise()
    result = run_sampler("DPM++ 3M SDE", sigmas, noise)
    levels = [float(sigma) for sigma in sigmas]
    x, evaluations = START.double() * levels[0], []
    for i in range(steps - 1):
        position = -math.log(levels[i])
        h = -math.log(levels[i + 1]) - position
        evaluations.append((position, denoise(x, levels[i])))
        phi1 = 1 - math.exp(-2 * h)
        phi2 = (math.exp(-2 * h) - 1 + 2 * h) / (2 * h)
        phi3 = phi2 / (2 * h) - 0.5
        x = math.exp(-2 * h) * x + phi1 * evaluations[-1][1]
        if len(evaluations) >= 2:
            (l0, d0), (l1, d1) = evaluations[-1], evaluations[-2]
            first = (d0 - d1) / (l0 - l1)
            if len(evaluations) == 2:
                x = x + phi2 * h * first
            else:
                l2, d2 = evaluations[-3]
                second = (first - (d1 - d2) / (l1 - l2)) / (l0 - l2)
                # slope at the newest point of the parabola through all three, and its curvature
                x = x + phi2 * h * (first + second * (l0 - l1)) - phi3 * h * h * second
        x = x + noise.samples[i].double() * levels[i + 1] * math.sqrt(1 - math.exp(-2 * h))
    expected = denoise(x, levels[-2])
    torch.testing.assert_close(result.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpmpp_sde_equals_diffusers_with_torchsdes_tree(steps: int):
    seed = 11
    scheduler = diffusers.DPMSolverSDEScheduler(
        **BETAS, use_karras_sigmas=True, noise_sampler_seed=[seed, seed + 1]
    )
    scheduler.set_timesteps(steps)
    # their list has every level twice: once for the middle of the step
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], torch.zeros(1)])
    assert len(sigmas) == steps + 1
    noise = BrownianNoise(
        [seed, seed + 1], SHAPE[1:], sigmas, "cpu", ahead=brownian_intervals("DPM++ SDE", sigmas)
    )
    result = run_sampler("DPM++ SDE", sigmas, noise)

    x = START * sigmas[0]
    for timestep in scheduler.timesteps:
        level = (
            scheduler.sigmas[scheduler.step_index]
            if scheduler.step_index is not None
            else scheduler.sigmas[0]
        )
        if not scheduler.state_in_first_order:
            level = scheduler.mid_point_sigma
        x = scheduler.step((x - denoise(x, float(level))) / level, timestep, x, return_dict=False)[
            0
        ]
    torch.testing.assert_close(result, x, **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_euler_equals_diffusers(steps: int):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(run_sampler("Euler", scheduler.sigmas), _ve(scheduler), **TOLERANCE)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_euler_a_equals_diffusers(steps: int):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    # both generate one noise a step from generators of the same seed, in the same order
    result = run_sampler("Euler a", scheduler.sigmas, RecordedNoise())
    torch.testing.assert_close(
        result, _ve(scheduler, torch.Generator().manual_seed(1)), **TOLERANCE
    )


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_heun_equals_diffusers(steps: int):
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    # their list repeats the inner levels for the second slope
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    assert len(sigmas) == steps + 1
    torch.testing.assert_close(run_sampler("Heun", sigmas), _ve(scheduler), **TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", [2, 10, 20])
def test_ddim_equals_diffusers(steps: int, eta: float):
    scheduler = diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(steps)
    sigmas = levels_of("DDIM", steps)
    generator = torch.Generator().manual_seed(1)
    x = START.clone()
    # Stable Diffusion's sampler ends at the first training step
    for sigma, timestep in zip(sigmas.tolist()[:-1], scheduler.timesteps, strict=False):
        noisy = x * math.sqrt(sigma**2 + 1)
        x = scheduler.step(
            (noisy - denoise(noisy, sigma)) / sigma,
            timestep,
            x,
            eta=eta,
            generator=generator,
            return_dict=False,
        )[0]
    result = run_sampler("DDIM", sigmas, RecordedNoise(), eta)
    torch.testing.assert_close(result, x, **TOLERANCE)


def test_ddim_cfgpp_adds_the_noise_without_the_prompt():
    """Write out algorithm 1 of the paper for two variance-preserving steps."""
    sigmas = levels_of("DDIM CFG++", 3)
    scale = 0.4
    clean: list[torch.Tensor] = []

    def guided(x: torch.Tensor, sigma: float) -> torch.Tensor:
        clean[:] = [denoise(x, sigma)]
        return clean[0] + scale * (denoise(-x, sigma) - clean[0])

    x = START.clone()
    for sigma, following in itertools.pairwise(sigmas.tolist()):
        alpha_bar, next_alpha_bar = 1 / (sigma**2 + 1), 1 / (following**2 + 1)
        noisy = x / math.sqrt(alpha_bar)
        target = guided(noisy, sigma)
        noise = (x - math.sqrt(alpha_bar) * clean[0]) / math.sqrt(1 - alpha_bar)
        x = math.sqrt(next_alpha_bar) * target + math.sqrt(1 - next_alpha_bar) * noise
    run = Run(guided, _no_noise, lambda *_: None, lambda: clean[0])
    start = START * SAMPLERS["DDIM CFG++"].noise_scale(float(sigmas[0]))
    torch.testing.assert_close(sample("DDIM CFG++", run, start, sigmas), x, **TOLERANCE)


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_plms_equals_diffusers(steps: int):
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(steps)
    x = START.clone()
    for timestep in scheduler.timesteps[:-1]:
        alpha_bar = float(scheduler.alphas_cumprod[timestep])
        sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
        noisy = x * math.sqrt(sigma**2 + 1)
        x = scheduler.step((noisy - denoise(noisy, sigma)) / sigma, timestep, x, return_dict=False)[
            0
        ]
    torch.testing.assert_close(run_sampler("PLMS", levels_of("PLMS", steps)), x, **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_ddpm_equals_diffusers(steps: int):
    scheduler = diffusers.DDPMScheduler(
        **BETAS, clip_sample=False, variance_type="fixed_small", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
    x = START * sigmas[0] / (sigmas[0] ** 2 + 1).sqrt()
    generator = torch.Generator().manual_seed(1)
    for sigma, timestep in zip(sigmas.tolist(), scheduler.timesteps[:-1], strict=False):
        noisy = x * math.sqrt(sigma**2 + 1)
        epsilon = (noisy - denoise(noisy, sigma)) / sigma
        x = scheduler.step(epsilon, timestep, x, generator=generator, return_dict=False)[0]
    # to level 0 diffusers adds noise of a clamped variance
    expected = denoise(x * (sigmas[-2] ** 2 + 1).sqrt(), float(sigmas[-2]))
    # an eta of the request is not for this sampler
    result = run_sampler("DDPM", sigmas, RecordedNoise(), eta=0.0)
    torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_lms_equals_diffusers(steps: int):
    scheduler = diffusers.LMSDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(run_sampler("LMS", scheduler.sigmas), _ve(scheduler), **TOLERANCE)


@pytest.mark.parametrize("steps", [2, 5])
def test_dpm2_equals_diffusers(steps: int):
    scheduler = diffusers.KDPM2DiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    # their list has every level twice
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    assert len(sigmas) == steps + 1
    torch.testing.assert_close(run_sampler("DPM2", sigmas), _dpm2(scheduler), **TOLERANCE)


def test_dpm2_a_equals_diffusers():
    steps = 5
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    result = run_sampler("DPM2 a", sigmas, RecordedNoise())
    expected = _dpm2(scheduler, torch.Generator().manual_seed(1))
    # they compute the levels of a step in float32, where the difference of squares cancels
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-3)


def _dpm2(scheduler, generator: torch.Generator | None = None) -> torch.Tensor:
    x = START * scheduler.sigmas[0]
    options = {"generator": generator} if generator else {}
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        index = scheduler.step_index
        if scheduler.state_in_first_order:
            level = scheduler.sigmas[index]
        else:  # the ancestral class counts otherwise
            level = scheduler.sigmas_interpol[index - 1 if generator else index]
        epsilon = (x - denoise(x, float(level))) / level
        x = scheduler.step(epsilon, timestep, x, return_dict=False, **options)[0]
    return x


def test_lcm_equals_diffusers():
    # at these late training steps the boundary functions of the scheduler are 1 and 0 up to 1e-7
    scheduler = diffusers.LCMScheduler(**BETAS, original_inference_steps=50, clip_sample=False)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.min() > 200
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
    x = START * sigmas[0] / (sigmas[0] ** 2 + 1).sqrt()
    generator = torch.Generator().manual_seed(1)
    for sigma, timestep in zip(sigmas.tolist(), scheduler.timesteps, strict=False):
        noisy = x * math.sqrt(sigma**2 + 1)
        epsilon = (noisy - denoise(noisy, sigma)) / sigma
        x = scheduler.step(epsilon, timestep, x, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(run_sampler("LCM", sigmas, RecordedNoise()), x, **TOLERANCE)


def _phi(k: int, z: float) -> float:
    """phi_k(z) = integral over [0, 1] of e^((1-t) z) t^(k-1) / (k-1)!, by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    t = (nodes + 1) / 2
    return float((weights / 2 * np.exp((1 - t) * z) * t ** (k - 1)).sum()) / math.factorial(k - 1)


@pytest.mark.parametrize("steps", [2, 3, 4, 8, 20])
def test_unipc_equals_the_published_update(steps: int):
    """Compare with UniPC of order 3, B(h) = h, data prediction, in float64.

    The order rises from 1 at the start and falls to 1 at the end. Each new evaluation first
    corrects the step before it. At order 2 the weights are 1/2, as in the paper's code.

    Source: Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8.
    """
    sigmas = levels_of("UniPC", steps)
    levels = [float(sigma) for sigma in sigmas]
    x, evaluations = START.double() * math.sqrt(levels[0] ** 2 + 1), []
    steps = len(levels) - 1

    def step(x, start: int, order: int, newest=None):
        """Step from level `start` to the next.

        Without `newest` this is the predictor. With `newest`, the evaluation at the next level, it
        is the corrector.
        """
        position, h = (
            -math.log(levels[start]),
            -math.log(levels[start + 1]) + math.log(levels[start]),
        )
        base = math.exp(-h) * x + (1 - math.exp(-h)) * evaluations[start]
        ratios = [(-math.log(levels[start - i]) - position) / h for i in range(1, order)]
        slopes = [
            (evaluations[start - i] - evaluations[start]) / r
            for i, r in zip(range(1, order), ratios, strict=True)
        ]
        if newest is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, newest - evaluations[start]]
        if not slopes:
            return base
        # sum_m rho_m r_m^(k-1) = k! phi_(k+1)(-h) * (-h) / B, with B = -h
        b = -h
        moments = [math.factorial(k) * _phi(k + 1, -h) * -h / b for k in range(1, len(ratios) + 1)]
        rho = np.linalg.solve(
            np.array([[r ** (k - 1) for r in ratios] for k in range(1, len(ratios) + 1)]), moments
        )
        if len(ratios) == 1 and (newest is None) == (order == 2):
            rho = [0.5]
        return base - b * sum(weight * slope for weight, slope in zip(rho, slopes, strict=True))

    before, order = x, 0
    for i in range(steps):
        clean = denoise(x, levels[i])
        if i > 0:
            x = step(before, i - 1, order, newest=clean)
        evaluations.append(clean)
        order = min(3, i + 1, steps - i)
        before = x
        x = step(x, i, order)
    x = x / math.sqrt(levels[-1] ** 2 + 1)
    torch.testing.assert_close(run_sampler("UniPC", sigmas).double(), x, **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 9, 14, 20, 30])
def test_unipc_equals_diffusers(steps: int):
    """Compare with the scheduler of diffusers, which computes its weights in float32."""
    sigmas = levels_of("UniPC", steps)
    steps = len(sigmas) - 1
    reference = diffusers.UniPCMultistepScheduler(
        solver_order=3, solver_type="bh1", prediction_type="sample"
    )
    reference.set_timesteps(steps)
    reference.sigmas, reference.timesteps = sigmas, torch.arange(steps)
    x = START.clone()
    for step, sigma in enumerate(sigmas[:-1].tolist()):
        clean = denoise(x * math.sqrt(sigma**2 + 1), sigma)
        x = reference.step(clean, step, x, return_dict=False)[0]
    torch.testing.assert_close(run_sampler("UniPC", sigmas), x, rtol=0, atol=3e-4)


def test_heunpp2_equals_the_published_update():
    """Write out the three kinds of steps of `sample_heunpp2` for three steps."""
    a, b, c, _ = levels = [10.0, 4.0, 1.0, 0.0]

    def slope(x, sigma):
        return (x - denoise(x, sigma)) / sigma

    x = START * a
    d = slope(x, a)
    two = x + d * (b - a)
    d_2 = slope(two, b)
    d_3 = slope(two + d_2 * (c - b), c)
    w_2, w_3 = b / (3 * a), c / (3 * a)
    x = x + ((1 - w_2 - w_3) * d + w_2 * d_2 + w_3 * d_3) * (b - a)
    d = slope(x, b)
    d_2 = slope(x + d * (c - b), c)
    w_2 = c / (2 * a)
    x = x + ((1 - w_2) * d + w_2 * d_2) * (c - b)
    expected = denoise(x, c)
    torch.testing.assert_close(run_sampler("HeunPP2", torch.tensor(levels)), expected, **TOLERANCE)


def test_ipndm_v_has_the_published_weights():
    # diff-sampler's formulas for these levels and slopes, newest first
    levels, slopes = [14.6, 9.1, 5.2, 3.3, 2.0, 1.1], [1.0, 0.7, 0.2, 0.9, 0.3]
    expected = [0.5936363636363636, -0.06071649390798328, 1.705920254649634, -0.6005587446814548]
    for i, value in enumerate(expected, start=1):
        history = [(torch.tensor(slopes[k]), levels[k]) for k in range(i, -1, -1)][:4]
        assert float(_mean_of_uneven_steps(history, levels[i + 1])) == pytest.approx(value)


def test_weights_of_ipndm_are_exact_for_even_steps():
    levels = torch.linspace(8, 1, 9)
    torch.testing.assert_close(
        run_sampler("IPNDM", levels), run_sampler("LMS", levels), **TOLERANCE
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_deis_equals_the_published_sum(steps: int):
    """Compare with diff-sampler's tAB-DEIS, whose integrals are sums of 10,000 terms.

    Its slopes are polynomials in the time t of a variance-preserving SDE with
    log alpha_bar = -t^2 (beta_1 - beta_0) / 2 - t beta_0.
    """
    sigmas = sigmas_for("Karras", steps, TABLE)
    low, high = math.log(0.002**2 + 1), math.log(80**2 + 1)
    growth = 2 * (low / 0.001 - high) / (0.001 - 1)
    beta = high - growth / 2
    times = (np.sqrt(beta**2 + 2 * growth * np.log(sigmas.double().numpy() ** 2 + 1)) - beta) / (
        growth
    )
    x, slopes = START.double() * float(sigmas[0]), []
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas.tolist())):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[:2]]
        if len(slopes) == 1 or following == 0:
            x = x + slopes[0] * (following - sigma)
            continue
        t = np.linspace(times[i], times[i + 1], 10_000)
        alpha_bar = np.exp(-(t**2) * growth / 2 - t * beta)
        speed = 0.5 * (t * growth + beta) / np.sqrt(alpha_bar * (1 - alpha_bar))
        known = times[[i - k for k in range(len(slopes))]]
        for j, slope in enumerate(slopes):
            others = np.delete(known, j)
            basis = np.prod([(t - other) / (known[j] - other) for other in others], axis=0)
            x = x + slope * float((speed * basis).sum() * (times[i + 1] - times[i]) / 10_000)
    # the sums are off by one of 10,000
    torch.testing.assert_close(run_sampler("DEIS", sigmas).double(), x, rtol=0, atol=2e-3)


def test_dpm_fast_equals_the_published_update():
    """Write out DPM-Solver-3 and DPM-Solver-1 for four calls, as in the paper.

    Source: Lu et al. 2022, arXiv 2206.00927, algorithm 2, with alpha = 1.
    """
    sigmas = levels_of("DPM fast", 4).tolist()
    sigma, following, last = sigmas[0], sigmas[3], sigmas[4]
    h = math.log(sigma / following)
    r_1, r_2 = 1 / 3, 2 / 3

    def noise(x, level):
        return (x - denoise(x, level)) / level

    x = START.double() * sigma
    start = noise(x, sigma)
    level_1, level_2 = (sigma * math.exp(-r * h) for r in (r_1, r_2))
    u_1 = x - level_1 * math.expm1(r_1 * h) * start
    d_1 = noise(u_1, level_1) - start
    u_2 = x - level_2 * math.expm1(r_2 * h) * start
    u_2 = u_2 - level_2 * r_2 / r_1 * (math.expm1(r_2 * h) / (r_2 * h) - 1) * d_1
    d_2 = noise(u_2, level_2) - start
    x = x - following * math.expm1(h) * start
    x = x - following / r_2 * (math.expm1(h) / h - 1) * d_2
    x = x - last * math.expm1(math.log(following / last)) * noise(x, following)
    result = run_sampler("DPM fast", torch.tensor(sigmas), eta=0.0)
    torch.testing.assert_close(result.double(), x, **TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_adaptive_equals_the_published_update(eta: float):
    """Write out the steps in t = -log sigma, in float64.

    Source: Lu et al. 2022, arXiv 2206.00927, appendix C. k-diffusion, `dpm_solver_adaptive`.
    """
    sigmas = levels_of("DPM adaptive", 8)
    end, s, h = -math.log(float(sigmas[-1])), -math.log(float(sigmas[0])), 0.05
    rejected, generator = 0, torch.Generator().manual_seed(3)
    x = before = START.double() * math.exp(-s)

    def eps(x: torch.Tensor, t: float) -> torch.Tensor:
        return (x - denoise(x, math.exp(-t))) / math.exp(-t)

    def unit_noise(*_: float) -> torch.Tensor:
        return torch.randn(SHAPE, generator=generator)

    while s < end - 1e-5:
        t = min(end, s + h)
        up = min(math.exp(-t), eta * math.exp(-t) * math.sqrt(1 - math.exp(2 * (s - t))))
        t_down = min(end, -math.log(math.sqrt(math.exp(-2 * t) - up**2))) if eta else t
        step, start = t_down - s, eps(x, s)
        u_1 = x - math.exp(-s - step / 3) * math.expm1(step / 3) * start
        d_1 = eps(u_1, s + step / 3) - start
        s_2, grown = s + step * 2 / 3, math.expm1(step * 2 / 3)
        u_2 = x - math.exp(-s_2) * (grown * start + 2 * (grown / (step * 2 / 3) - 1) * d_1)
        d_2 = eps(u_2, s_2) - start
        whole, level = math.expm1(step), math.exp(-t_down)
        low = x - level * whole * (start + 1.5 * d_1)
        high = x - level * (whole * start + 1.5 * (whole / step - 1) * d_2)
        tolerated = (0.05 * torch.maximum(low.abs(), before.abs())).clamp(min=0.0078)
        error = float((((low - high) / tolerated) ** 2).mean().sqrt())
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / (1.5 if eta else 3)) - 1)
        h *= factor
        if factor < 0.81:
            rejected += 1
            continue
        added = math.exp(-2 * t) - math.exp(-2 * t_down)
        x, before, s = high, low, t
        if added > 1e-9:
            x = x + math.sqrt(added) * unit_noise()
    generator.manual_seed(3)
    result = run_sampler("DPM adaptive", sigmas, unit_noise, eta)
    assert rejected
    torch.testing.assert_close(result.double(), x, rtol=0, atol=1e-3)


def test_dpm_adaptive_stops_after_too_many_calls():
    """A prediction that jumps makes every step too long."""
    numbers = itertools.count()
    run = make_run(lambda x, _: x * (next(numbers) % 2), _no_noise, lambda *_: None, eta=0.0)
    sigmas = levels_of("DPM adaptive", 8)
    with pytest.raises(InvalidRequest, match="more than 450 calls") as error:
        sample("DPM adaptive", run, START * float(sigmas[0]), sigmas)
    assert error.value.field == "sampler"
    assert next(numbers) == 450


def test_dpm_adaptive_ends_at_numbers_that_are_not_finite():
    numbers = itertools.count()
    run = make_run(lambda x, _: x * math.nan + next(numbers), _no_noise, lambda *_: None, eta=0.0)
    sigmas = levels_of("DPM adaptive", 8)
    assert sample("DPM adaptive", run, START * float(sigmas[0]), sigmas).isnan().all()
    assert next(numbers) == 3


# --- a Gaussian, whose exact path is known

SPREAD = 0.8


def _denoise_gaussian(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the mean clean latent, for latents of standard deviation `SPREAD`."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("Euler", 1),
        ("Heun", 2),
        ("DPM2", 2),
        ("DPM++ 2S a", 2),
        ("DPM++ SDE", 2),
        ("DPM++ 2M", 2),
        ("DPM++ 2M SDE", 2),
        ("DPM++ 2M SDE Heun", 2),
    ],
)
def test_errors_of_a_sampler_fall_with_its_order(name: str, order: int):
    start, end = 5.0, 0.5
    spreads = torch.tensor([0.3, 0.8, 2.0], dtype=torch.float64)
    exact = ((spreads**2 + end**2) / (spreads**2 + start**2)).sqrt() * start

    def denoise_gaussian(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * spreads**2 / (spreads**2 + sigma**2)

    def error(steps: int) -> float:
        levels = np.geomspace(start, end, steps + 1).tolist()
        run = make_run(denoise_gaussian, _no_noise)
        x = torch.full((3,), start, dtype=torch.float64)
        return float((SAMPLERS[name].function(run, x, levels) - exact).norm())

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(
    "name",
    # LCM keeps the spread of consistency models alone
    [name for name in ON_GIVEN_LEVELS if SAMPLERS[name].noise != "none" and name != "LCM"],
)
def test_noisy_samplers_keep_the_spread_of_a_gaussian(name: str, eta: float):
    sigmas = levels_of(name, 150)
    generator = torch.Generator().manual_seed(3)

    def noise(_sigma: float, _following: float) -> torch.Tensor:
        return torch.randn(20_000, generator=generator)

    start = float(sigmas[0])
    x = noise(0, 0) * math.sqrt(SPREAD**2 + start**2)
    result = sample(name, make_run(_denoise_gaussian, noise, eta=eta), x, sigmas)
    # the error of the steps, and 0.5 % of 20,000 samples
    assert float(result.std()) == pytest.approx(SPREAD, rel=0.04)


@pytest.mark.parametrize(
    ("name", "deterministic"),
    [
        ("Euler a", "Euler"),
        ("DPM2 a", "DPM2"),
        ("DPM++ 2M SDE", "DPM++ 2M"),
        ("DPM++ SDE", "DPM++ 2S a"),
        ("DDIM CFG++", "DDIM"),
    ],
)
def test_eta_zero_makes_a_sampler_deterministic(name: str, deterministic: str):
    sigmas = sigmas_for("Karras", 8, TABLE)
    # `_no_noise` raises
    result = run_sampler(name, sigmas, _no_noise, eta=0.0)
    expected = run_sampler(deterministic, sigmas, _no_noise, eta=0.0)
    torch.testing.assert_close(result, expected, **TOLERANCE)


def test_dpmpp_sde_queries_the_levels_of_float32():
    """Compare with the levels at which Forge called the network.

    Forge's Brownian path has other noise at a level that is off by 1e-6.
    """
    sigmas = sigmas_for("Simple", 6, TABLE)
    middles = [following for _, following in brownian_intervals("DPM++ SDE", sigmas)[::2]]
    expected = [9.3353634, 4.1715999, 2.1695385, 1.22629, 0.6775704]
    # one unit in the last place, which depends on the CPU's exponential
    np.testing.assert_allclose(middles, expected, rtol=1.2e-7, atol=0)


# --- properties of all of them


@pytest.mark.parametrize("name", ON_GIVEN_LEVELS)
def test_sampling_loop_leaves_the_device_alone(name: str):
    """Check on the meta device, where reading a value raises."""
    sigmas = levels_of(name, 6)
    with Transfers() as transfers:
        run = make_run(
            lambda x, sigma: x / (sigma + 1),
            lambda sigma, following: torch.empty(SHAPE, device="meta"),
            eta=SAMPLERS[name].eta,
        )
        result = sample(name, run, torch.empty(SHAPE, device="meta"), sigmas)
    assert result.device.type == "meta"
    assert transfers.operations == []


def test_transfers_finds_every_way_to_a_device():
    with Transfers() as transfers:
        values = torch.ones(2)
        on_device = values.to("meta")
        on_device.copy_(values)
        torch.tensor([1.0], device="meta")
        torch.add(torch.zeros(2, device="meta"), torch.tensor(1.0))
        on_device * 2 + torch.zeros(2, device="meta")
    assert transfers.operations == ["to", "copy_", "tensor", "add"]
    with pytest.raises(RuntimeError):
        float(on_device.sum())


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "IPNDM_V"])
def test_sampler_with_perfect_denoiser_returns_its_target(name: str):
    target = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)
    sigmas = levels_of(name, 12)
    run = make_run(lambda x, sigma: target, RecordedNoise(), eta=SAMPLERS[name].eta)
    result = sample(name, run, target + START * float(sigmas[0]), sigmas)
    last = float(sigmas[-1])
    if last:  # the latent keeps the noise of the last level
        clean = target / math.sqrt(last**2 + 1) if SAMPLERS[name].preserves_variance else target
        assert float((result - clean).std()) == pytest.approx(last, rel=0.2)
    else:
        torch.testing.assert_close(result, target, **TOLERANCE)


@pytest.mark.parametrize("name", ON_GIVEN_LEVELS)
def test_sampler_requests_exactly_its_own_noise(name: str):
    sigmas = levels_of(name, 5)
    requested: list[tuple[float, float]] = []

    def noise(sigma: float, following: float) -> torch.Tensor:
        requested.append((sigma, following))
        return torch.zeros(SHAPE)

    run_sampler(name, sigmas, noise)
    if SAMPLERS[name].noise == "brownian":
        assert requested == brownian_intervals(name, sigmas)
    else:
        assert brownian_intervals(name, sigmas) == []
        # DDIM has none by default, Restart from 20 steps on, DPM fast between its two steps
        expected = {"DDIM": 0, "DDIM CFG++": 0, "Restart": 0, "DPM fast": 1}
        is_fresh = SAMPLERS[name].noise == "fresh"
        assert len(requested) == expected.get(name, 4 if is_fresh else 0)


@pytest.mark.parametrize("name", ON_GIVEN_LEVELS)
def test_sampler_one_step_returns_the_predicted_latent(name: str):
    sigmas = levels_of(name, 1)
    first, last = float(sigmas[0]), float(sigmas[-1])
    start = START * SAMPLERS[name].noise_scale(first)
    clean = denoise(start, first)
    result = run_sampler(name, sigmas, RecordedNoise())
    if name == "PLMS":  # its first step has two slopes
        slope = (start - clean) / first
        moved = start + slope * (last - first)
        clean = start - first * (slope + (moved - denoise(moved, last)) / last) / 2
    expected = clean + (start - clean) * last / first
    if SAMPLERS[name].preserves_variance:
        expected = expected / math.sqrt(last**2 + 1)
    # x + (x - clean) / sigma * -sigma cancels terms of size 15
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
