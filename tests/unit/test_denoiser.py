"""The sampling loop with a real UNet on the meta device: transfers and prepared texts."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from tests.support.small_unet import CONFIG
from tests.support.transfers import Transfers

from alphalayer.engine.families.base import NoiseProcess
from alphalayer.engine.memory import MEMORY_MODES
from alphalayer.engine.networks.unet import UNet
from alphalayer.engine.sampling.guidance import PREPARED_TOKENS, Denoiser, Guidance
from alphalayer.engine.sampling.run import Run
from alphalayer.engine.sampling.samplers import sample
from alphalayer.engine.sampling.schedules import SigmaTable, sigmas_for
from alphalayer.engine.text.encoders import Conditioning, PromptPlan

PROCESS = NoiseProcess(SigmaTable.from_betas(), "epsilon")
STEPS = 8


class Model:
    """Part of `DiffusionModel` that the denoiser uses, as `StableDiffusion` has it."""

    def __init__(self, device: str):
        with torch.device(device):
            torch.manual_seed(0)
            self.unet = UNet(CONFIG).half().requires_grad_(False)
        self.process, self.modules = PROCESS, {"denoiser": self.unet}
        self.prepared, self.crop = 0, (0, 0)

    def prepare(
        self, conditioning: Conditioning, width: int, height: int, crop: tuple[int, int]
    ) -> Any:
        self.prepared += 1
        self.crop = crop
        weight = self.unet.conv_in.weight
        texts = (conditioning.context.to(weight.dtype), conditioning.pooled.to(weight.dtype))
        return self.unet.prepare(*texts, (height, width, *crop, height, width))

    def denoise(self, x: torch.Tensor, sigma: float, prepared: Any, condition: Any = None):
        timestep = torch.full((1,), self.process.table.timestep(sigma), device=x.device)
        return self.unet(x.half(), timestep, prepared, condition).float()


def make_text(device: str, tokens: int = 77) -> Conditioning:
    with torch.device(device):
        return Conditioning(torch.ones(1, tokens, 16), torch.ones(1, 8))


def generate(model: Any, positive: PromptPlan, negative: PromptPlan, device: str, **options: Any):
    guidance = Guidance(positive, negative, 5.0, images=2, **options)
    denoiser = Denoiser(model, [guidance], 64, 64, MEMORY_MODES["high"])
    noise = torch.ones(2, 4, 8, 8, device=device)
    steps = count()
    run = Run(
        lambda x, sigma: denoiser(x, sigma, next(steps)),
        lambda *_: noise,
        lambda *_: None,
        denoiser.unconditional,
        eta=1.0,
    )
    with torch.inference_mode():
        sigmas = sigmas_for("Karras", STEPS, PROCESS.table)
        return sample("DPM++ 2M SDE", run, noise * 14.0, sigmas)


def constant(text: Conditioning, steps: int = STEPS) -> PromptPlan:
    return PromptPlan([(1.0, [(steps, text)])])


def test_loop_copies_to_the_device_only_to_prepare():
    model, text = Model("meta"), make_text("meta")
    condition = torch.ones(1, 32, 8, 8, device="meta")
    with Transfers() as transfers:
        result = generate(
            model, constant(text), constant(make_text("meta")), "meta", condition=condition
        )
    assert result.device.type == "meta"
    # the six sizes, once an image
    assert transfers.operations == ["tensor"]
    assert model.prepared == 1


@pytest.mark.parametrize(("switches", "prepared"), [(1, 2), (2, 3)])
def test_text_is_prepared_again_only_when_it_changes(switches: int, prepared: int):
    model = Model("cpu")
    schedule = [(2 * (i + 1), make_text("cpu")) for i in range(switches)]
    plan = PromptPlan([(1.0, [*schedule, (STEPS, make_text("cpu"))])])
    generate(model, plan, constant(make_text("cpu")), "cpu")
    assert model.prepared == prepared


def test_alternating_texts_are_prepared_once_each():
    model = Model("cpu")
    texts = make_text("cpu"), make_text("cpu")
    plan = PromptPlan([(1.0, [(step, texts[step % 2]) for step in range(STEPS)])])
    generate(model, plan, constant(make_text("cpu")), "cpu")
    assert model.prepared == 2


def test_prepared_texts_have_a_limit_in_tokens():
    model = Model("meta")
    guidance = Guidance(
        PromptPlan([(1.0, [(step, make_text("meta", 77 * 40)) for step in range(5)])]),
        constant(make_text("meta")),
        5.0,
    )
    denoiser = Denoiser(model, [guidance], 64, 64, MEMORY_MODES["high"])  # type: ignore[arg-type]
    for step in range(5):
        denoiser(torch.ones(1, 4, 8, 8, device="meta"), 1.0, step)
        held = [prepared.tokens for prepared in denoiser._prepared.values()]
        assert held[-1] == 77 * 40
        assert sum(held) <= PREPARED_TOKENS


def test_unconditional_is_the_prediction_of_the_negative_prompt():
    model = Model("cpu")
    negative = Conditioning(torch.zeros(1, 77, 16), torch.zeros(1, 8))
    texts = constant(make_text("cpu")), constant(negative)
    x = torch.ones(2, 4, 8, 8)
    with torch.inference_mode():
        predicted: list[torch.Tensor] = []
        for scale in (5.0, 0.0):
            guidance = Guidance(*texts, scale, images=2)
            denoiser = Denoiser(model, [guidance], 64, 64, MEMORY_MODES["high"])  # type: ignore[arg-type]
            predicted += [denoiser(x, 1.0, 0), denoiser.unconditional()]
    guided, unconditional, alone, _ = predicted
    assert torch.equal(unconditional, alone)
    assert not torch.equal(unconditional, guided)


def test_removed_patch_prepares_the_text_again():
    model, text = Model("cpu"), make_text("cpu")
    guidance = Guidance(constant(text), constant(make_text("cpu")), 5.0)
    denoiser = Denoiser(model, [guidance], 64, 64, MEMORY_MODES["high"])  # type: ignore[arg-type]
    for patched in (True, True, False, False):
        denoiser(torch.ones(1, 4, 8, 8), 1.0, 0, patched=patched)
    assert model.prepared == 2


def test_equal_prompts_keep_their_own_conditions():
    """Texts of unlike lengths are calls of their own, one after the other."""
    model, received = Model("cpu"), list[float]()

    def denoise(x: torch.Tensor, _sigma: float, _text: Any, condition: torch.Tensor):
        received.append(float(condition.mean()))
        return x

    model.denoise = denoise  # type: ignore[method-assign]
    texts = constant(make_text("cpu", 77 * 5)), constant(make_text("cpu"))
    guidances = [
        Guidance(*texts, 5.0, condition=torch.full((1, 4, 8, 8), float(i))) for i in range(2)
    ]
    denoiser = Denoiser(model, guidances, 64, 64, MEMORY_MODES["high"])  # type: ignore[arg-type]
    for step in range(2):
        denoiser(torch.ones(2, 4, 8, 8), 1.0, step)
    assert received == [0.0, 0.0, 1.0, 1.0] * 2


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_negative_is_kept_for_a_sampler_that_uses_it(step: int, scale: float):
    positive, negative = make_text("cpu"), make_text("cpu")
    texts = constant(positive), constant(negative)
    guidance = Guidance(*texts, scale, min_uncond=2.0, keep_negative=True)
    assert guidance.conditionings(step, 1.0) == [negative, positive]


def test_crop_reaches_the_model():
    model, text = Model("cpu"), make_text("cpu")
    guidance = Guidance(constant(text), constant(make_text("cpu")), 5.0)
    denoiser = Denoiser(
        model,  # type: ignore[arg-type]
        [guidance],
        64,
        64,
        MEMORY_MODES["high"],
        crop=(8, 16),
    )
    denoiser(torch.ones(1, 4, 8, 8), 1.0, 0)
    assert model.crop == (8, 16)


@pytest.mark.parametrize(
    ("step", "sigma", "rows"), [(0, 1.0, 2), (1, 1.0, 1), (1, 2.0, 2), (2, 0.5, 2), (3, 0.0, 1)]
)
def test_negative_is_left_out_of_odd_steps_below_a_level(step: int, sigma: float, rows: int):
    positive, negative = make_text("cpu"), make_text("cpu")
    guidance = Guidance(constant(positive), constant(negative), 5.0, min_uncond=2.0)
    assert len(guidance.conditionings(step, sigma)) == rows
    assert guidance.conditionings(step, sigma)[-1] is positive
    both = PromptPlan([(1.0, [(STEPS, positive)]), (-1.0, [(STEPS, positive)])])
    with_and = Guidance(both, constant(negative), 5.0, min_uncond=2.0)
    assert len(with_and.conditionings(step, sigma)) == 3, "parts of AND differ from the negative"
