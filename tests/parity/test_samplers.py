"""The ten samplers against independent implementations, in float32, with the same noise.

The references are the schedulers of diffusers. For DPM++ 3M SDE and UniPC they are the updates of
the papers, in float64. The denoiser is a small random network of latent and noise level, which is
far from linear.
"""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from tests.support.transfers import Transfers

from alphalayer.core import request
from alphalayer.engine.sampling.brownian_tree import BrownianNoise
from alphalayer.engine.sampling.samplers import SAMPLERS, brownian_intervals, sample
from alphalayer.engine.sampling.schedules import SCHEDULES, SigmaTable, sigmas_for

SHAPE = (2, 4, 6, 5)
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
TABLE = SigmaTable.from_betas()
# the clean latent is of size 1, so this is absolute and relative at once
TOLERANCE = {"rtol": 0, "atol": 1e-4}

_generator = torch.Generator().manual_seed(0)
_IN, _OUT, _TIME = (
    torch.randn(size, generator=_generator, dtype=torch.float64)
    for size in ((4, 16), (16, 4), (16,))
)


def denoise(x: torch.Tensor, sigma: float, step: int = 0) -> torch.Tensor:
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


def run_sampler(name: str, sigmas: torch.Tensor, noise=None) -> torch.Tensor:
    """Return our result from the common start, and check the calls of `on_step`."""
    completed: list[int] = []
    last: list[torch.Tensor] = []

    def on_step(step: int, x: torch.Tensor, clean: torch.Tensor) -> None:
        completed.append(step)
        last[:] = [x]
        assert clean.shape == SHAPE

    result = sample(name, denoise, START * float(sigmas[0]), sigmas, noise or _no_noise, on_step)
    assert completed == list(range(1, len(sigmas)))
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
    assert set(SAMPLERS) == set(request.SAMPLERS)
    assert set(SCHEDULES) == set(request.SCHEDULERS)


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


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_ddim_equals_diffusers(steps: int):
    scheduler = diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    scheduler.set_timesteps(steps)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
    x = START * sigmas[0] / (sigmas[0] ** 2 + 1).sqrt()
    for sigma, timestep in zip(sigmas.tolist(), scheduler.timesteps, strict=False):
        noisy = x * math.sqrt(sigma**2 + 1)
        x = scheduler.step(
            (noisy - denoise(noisy, sigma)) / sigma, timestep, x, eta=0.0, return_dict=False
        )[0]
    torch.testing.assert_close(run_sampler("DDIM", sigmas), x, **TOLERANCE)


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
    """Compare with UniPC of order 3, B(h) = e^h - 1, data prediction, in float64.

    The order rises from 1 at the start and falls to 1 at the end. Each new evaluation first
    corrects the step before it. At order 2 the weights are 1/2, as in the paper's code.

    Source: Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8.
    """
    sigmas = sigmas_for("Karras", steps, TABLE)
    levels = [float(sigma) for sigma in sigmas]
    x, evaluations = START.double() * levels[0], []

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
        # sum_m rho_m r_m^(k-1) = k! phi_(k+1)(-h) * (-h) / B, with B = e^-h - 1
        b = math.expm1(-h)
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
        x = step(x, i, order) if levels[i + 1] > 0 else clean
    torch.testing.assert_close(run_sampler("UniPC", sigmas).double(), x, **TOLERANCE)


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_unipc_equals_diffusers(scheduler: str):
    """Compare with the scheduler of diffusers, which computes its weights in float32.

    The largest difference over 1 to 30 steps is 1e-4. So is that of either to float64.
    """
    for steps in (1, 2, 3, 4, 5, 6, 9, 14, 20, 30):
        sigmas = sigmas_for(scheduler, steps, TABLE)
        reference = diffusers.UniPCMultistepScheduler(solver_order=3, prediction_type="sample")
        reference.set_timesteps(steps)
        reference.sigmas, reference.timesteps = sigmas, torch.arange(steps)
        x = START * sigmas[0] / (sigmas[0] ** 2 + 1).sqrt()
        for step, sigma in enumerate(sigmas[:-1].tolist()):
            clean = denoise(x * math.sqrt(sigma**2 + 1), sigma)
            x = reference.step(clean, step, x, return_dict=False)[0]
        torch.testing.assert_close(run_sampler("UniPC", sigmas), x, rtol=0, atol=3e-4)


# --- properties of all of them


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_loop_leaves_the_device_alone(name: str):
    """Check on the meta device, where reading a value raises."""
    sigmas = sigmas_for("Karras", 6, TABLE)
    with Transfers() as transfers:
        result = sample(
            name,
            lambda x, sigma, step: x / (sigma + 1),
            torch.empty(SHAPE, device="meta"),
            sigmas,
            lambda sigma, following: torch.empty(SHAPE, device="meta"),
            lambda *_: None,
        )
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


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_with_perfect_denoiser_returns_its_target(name: str):
    target = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)
    sigmas = sigmas_for("Karras", 12, TABLE)
    result = sample(
        name,
        lambda x, sigma, step: target,
        START * float(sigmas[0]),
        sigmas,
        RecordedNoise(),
        lambda *_: None,
    )
    torch.testing.assert_close(result, target, **TOLERANCE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_requests_exactly_its_own_noise(
    name: str,
):
    sigmas = sigmas_for("Karras", 5, TABLE)
    requested: list[tuple[float, float]] = []

    def noise(sigma: float, following: float) -> torch.Tensor:
        requested.append((sigma, following))
        return torch.zeros(SHAPE)

    run_sampler(name, sigmas, noise)
    if SAMPLERS[name].noise == "brownian":
        assert requested == brownian_intervals(name, sigmas)
    else:
        assert brownian_intervals(name, sigmas) == []
        assert len(requested) == (4 if SAMPLERS[name].noise == "fresh" else 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_one_step_returns_the_predicted_latent(name: str):
    sigmas = sigmas_for("Karras", 1, TABLE)
    # x + (x - clean) / sigma * -sigma cancels terms of size 15
    torch.testing.assert_close(
        run_sampler(name, sigmas, RecordedNoise()),
        denoise(START * sigmas[0], float(sigmas[0])),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["DPM++ 2M", "Heun", "UniPC"])
def test_higher_order_is_closer_to_the_exact_path_than_euler(name: str):
    exact = run_sampler("Heun", sigmas_for("Karras", 400, TABLE))
    # at 60 steps the error of Euler is 0.004, that of the multistep methods at most 0.0005
    coarse = sigmas_for("Karras", 60, TABLE)

    def error(result):
        return float((result - exact).abs().mean())

    assert error(run_sampler(name, coarse)) < error(run_sampler("Euler", coarse)) / 4
