"""The sampling stage of the pipeline: noise of each image, calls of the denoiser, progress."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphalayer.core import cost
from alphalayer.core.request import MAX_SEED, GenerationOptions, GenerationRequest, ModelDefaults
from alphalayer.core.samplers import ADAPTIVE, SCHEDULERS, total_steps
from alphalayer.engine import passes
from alphalayer.engine.base import Progress, RenderTask
from alphalayer.engine.canvas import Canvas
from alphalayer.engine.families.base import LatentSpec
from alphalayer.engine.passes import Pass
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.sampling.noise import ImageGenerator
from alphalayer.engine.sampling.run import Run
from alphalayer.engine.sampling.samplers import SAMPLERS, count_steps, sample
from alphalayer.engine.sampling.schedules import SigmaTable

TABLE = SigmaTable.from_betas()
SHAPE = (4, 2, 3)


def make_engine() -> LocalEngine:
    engine = object.__new__(LocalEngine)
    engine.device = torch.device("cpu")
    return engine


def resolve(sampler: str, **options: Any):
    request = GenerationRequest(
        prompt="an apple", sampler=sampler, seed=7, options=GenerationOptions(**options)
    )
    return request.resolve(ModelDefaults())


def make_pass(sampler: str, scheduler: str = "Karras", steps: int = 5, **options: Any) -> Pass:
    levels = SAMPLERS[sampler].choose_levels(scheduler, steps, TABLE)
    return Pass(0, [resolve(sampler, **options)], Canvas.of(24, 16, 8), levels)


def make_noise(sampler: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first latent, and the first noise of the sampler."""
    run = make_pass(sampler, **options)
    start, source = make_engine()._noise(run, LatentSpec(4, 8, 1.0), None)
    with source as noise:
        return start, noise(*run.levels.sigmas[:2].tolist())


def test_noise_seed_delta_changes_fresh_noise_only():
    start, fresh = make_noise("Euler a")
    moved_start, moved = make_noise("Euler a", noise_seed_delta=31337)
    assert torch.equal(start, moved_start)
    assert not torch.equal(fresh, moved)
    assert torch.equal(moved[0], ImageGenerator(7 + 31337, "nv").randn(SHAPE))


def test_noise_seed_delta_leaves_brownian_paths():
    # as in AUTOMATIC1111
    before, after = (make_noise("DPM++ 2M SDE", noise_seed_delta=delta) for delta in (0, 31337))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("source", ["nv", "cpu"])
def test_noise_seed_delta_above_the_largest_seed_starts_at_zero(source: str):
    request = GenerationRequest(
        prompt="an apple",
        sampler="Euler a",
        seed=MAX_SEED,
        batch_size=3,
        noise=source,
        options=GenerationOptions(noise_seed_delta=MAX_SEED),
    ).resolve(ModelDefaults())
    run = replace(make_pass("Euler a"), requests=[request])
    _, source_of_noise = make_engine()._noise(run, LatentSpec(4, 8, 1.0), None)
    with source_of_noise as noise:
        fresh = noise(*run.levels.sigmas[:2].tolist())
    # 2 * (2^63 - 1) + 2 = 2^64
    assert torch.equal(fresh[2], ImageGenerator(0, source).randn(SHAPE))


@pytest.mark.parametrize(("eta", "requested"), [(None, 4), (0.5, 4), (0.0, 0)])
def test_eta_of_the_request_reaches_the_sampler(eta: float | None, requested: int):
    noises: list[float] = []
    sample_with("Euler a", lambda sigma, _: noises.append(sigma), eta=eta)
    assert len(noises) == requested


@pytest.mark.parametrize(
    ("sampler", "calls", "steps"),
    [("Heun", 9, 5), ("DPM++ SDE", 9, 5), ("Euler", 5, 5), ("DDIM", 4, 4), ("DPM fast", 5, 5)],
)
def test_prompts_count_calls_and_progress_counts_steps(sampler: str, calls: int, steps: int):
    denoiser, progress = sample_with(sampler)
    assert denoiser.calls == list(range(calls))
    assert [entry.step for entry in progress] == sorted({entry.step for entry in progress})
    assert {entry.steps for entry in progress} == {steps}
    assert progress[-1].step == steps


def test_progress_counts_repeated_levels():
    _, progress = sample_with("LCM", scheduler="Simple", steps=60)
    assert [(entry.step, entry.steps) for entry in progress][-1] == (60, 60)


@pytest.mark.parametrize(("sampler", "is_kept"), [("DDIM CFG++", True), ("DDIM", False)])
def test_negative_prompt_is_kept_for_cfgpp(
    sampler: str, is_kept: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(passes, "plan_prompt", lambda *_: None)
    monkeypatch.setattr(passes, "plan_negative", lambda *_: None)
    request = resolve(sampler).model_copy(update={"cfg_scale": 12.5})
    guidance = passes.read_prompts(request, None, lambda: None)  # type: ignore[arg-type]
    assert guidance.keep_negative is is_kept
    assert guidance.scale == (1.0 if is_kept else 12.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_of_the_cost_are_those_of_the_engine(sampler: str):
    for scheduler in SCHEDULERS:
        for steps in (1, 2, 3, 19, 20, 36, 49, 50, 60, 143, 150):
            sigmas = SAMPLERS[sampler].levels(scheduler, steps, TABLE)
            counted = cost.count_steps(sampler, scheduler, steps)
            assert count_steps(sigmas) == counted, (scheduler, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_second_pass_steps_of_the_cost_are_those_of_the_engine(sampler: str):
    for scheduler in SCHEDULERS:
        for steps, strength in ((1, 1.0), (2, 0.5), (20, 0.75), (60, 0.5), (150, 0.25), (150, 1.0)):
            total = total_steps(steps, strength)
            sigmas = SAMPLERS[sampler].choose_levels(scheduler, steps, TABLE, total).sigmas
            counted = cost.count_steps(sampler, scheduler, steps, total)
            assert count_steps(sigmas) == counted, (scheduler, steps, strength)


@pytest.mark.parametrize("scheduler", ["Normal", "KL Optimal", "DDIM"])
@pytest.mark.parametrize(
    "sampler",
    # the calls of DPM adaptive depend on the image
    [name for name in SAMPLERS if name != ADAPTIVE],
)
def test_calls_of_the_cost_are_those_of_the_engine(sampler: str, scheduler: str):
    for steps in (1, 2, 21, 40):
        calls: list[float] = []
        progress: list[int] = []
        x = torch.zeros(1)
        run = Run(
            lambda x, sigma, calls=calls: calls.append(sigma) or x,
            lambda *_, x=x: x,
            lambda step, *_, progress=progress: progress.append(step),
            lambda x=x: x,
            SAMPLERS[sampler].eta,
        )
        sigmas = SAMPLERS[sampler].levels(scheduler, steps, TABLE)
        sample(sampler, run, x, sigmas)
        taken = cost.count_steps(sampler, scheduler, steps)
        most = cost.count_calls(sampler, taken)
        assert most - 3 <= len(calls) <= most, steps
        assert progress[-1] == max(progress) == taken, steps


class Denoiser:
    """Denoiser that records the indices of its calls."""

    def __init__(self):
        self.calls: list[int] = []
        self.guidances = [SimpleNamespace(images=1)]
        self.kept = None

    def __call__(self, x: torch.Tensor, sigma: float, call: int, *, patched: bool) -> torch.Tensor:
        self.calls.append(call)
        return x / (1 + sigma)

    def unconditional(self) -> torch.Tensor:
        raise AssertionError("for CFG++ only")


def sample_with(
    sampler: str, record: Any = lambda *_: None, **options: Any
) -> tuple[Denoiser, list[Progress]]:
    denoiser, progress = Denoiser(), list[Progress]()
    run = make_pass(sampler, **options)
    task = RenderTask(run.shared, (), progress.append, lambda: False, False)

    def noise(sigma: float, following: float) -> torch.Tensor:
        record(sigma, following)
        return torch.ones(1, *SHAPE)

    make_engine()._sample(
        SimpleNamespace(tasks=[task], passes=[run]),  # type: ignore[arg-type]
        run,
        denoiser,  # type: ignore[arg-type]
        SimpleNamespace(apply=lambda sigma: True),  # type: ignore[arg-type]
        torch.ones(1, *SHAPE),
        noise,
    )
    return denoiser, progress
