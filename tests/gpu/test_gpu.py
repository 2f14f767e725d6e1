"""The CPU's images on a CUDA GPU in every memory mode, and released memory.

Not part of the default run: `python3 run.py test -m gpu`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alphalayer.core.request import GenerationRequest
from alphalayer.core.samplers import SAMPLERS
from alphalayer.engine.memory import MEMORY_MODES
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.sampling.brownian_tree import BrownianNoise
from alphalayer.engine.sampling.noise import ImageGenerator
from alphalayer.engine.sampling.philox import philox_normal
from alphalayer.engine.sampling.run import Run
from alphalayer.engine.sampling.samplers import SAMPLERS as SAMPLERS_OF_ENGINE
from alphalayer.engine.sampling.samplers import sample
from alphalayer.engine.sampling.schedules import SigmaTable
from tests.support import tiny_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "tiny")
    return folder


def render(models_dir, device, **fields):
    memory, dtype = fields.pop("memory", "high"), fields.pop("dtype", "fp32")
    engine = LocalEngine(models_dir, device=device, dtype=dtype, memory=memory)
    return (
        engine.generate(
            GenerationRequest(prompt="an apple", width=128, height=128, steps=4, **fields)
        )
        .images[0]
        .rgba
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gpu_image_equals_the_cpu_image(models_dir, sampler):
    on_cpu = render(models_dir, "cpu", sampler=sampler).astype(int)
    on_gpu = render(models_dir, "cuda", sampler=sampler).astype(int)
    # float32 sums in another order, truncated to 8 bits: values differ by at most 1, except for
    # few pixels of a chaotic tiny model
    assert np.mean(np.abs(on_cpu - on_gpu) > 1) < 0.001


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_gpu_memory_mode_gives_the_same_image(models_dir, memory, dtype):
    high, other = (
        render(models_dir, "cuda", dtype=dtype),
        render(models_dir, "cuda", dtype=dtype, memory=memory),
    )
    assert np.mean(np.abs(high.astype(int) - other.astype(int)) > 8) < 0.02


def test_philox_normal_equals_the_generator_of_torch():
    """Compare Philox in torch operations with cuRAND's in PyTorch's CUDA kernels.

    The counts are those for which the kernels have one thread for each element.
    """
    gpu = torch.cuda.get_device_properties(0)
    for count in (
        1000,
        65536,
        gpu.multi_processor_count * (gpu.max_threads_per_multi_processor // 256) * 256,
    ):
        torch_numbers = torch.randn(
            count, generator=torch.Generator("cuda").manual_seed(12345), device="cuda"
        )
        numbers = philox_normal([12345], count)[0]
        assert (torch_numbers.cpu() - numbers).abs().max() < 1e-5, count


@pytest.mark.parametrize("source", ["nv", "cpu", "gpu"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_loop_does_not_wait_for_the_gpu(sampler, source):
    sigmas = SAMPLERS_OF_ENGINE[sampler].levels("Karras", 6, SigmaTable.from_betas())
    seeds, shape = [5, 6], (4, 32, 32)
    generators = [ImageGenerator(seed, source, "cuda") for seed in seeds]

    def fresh(sigma, following):
        return torch.stack([generator.randn(shape) for generator in generators])

    brownian = BrownianNoise(seeds, shape, sigmas, source, "cuda")
    noise = brownian if SAMPLERS_OF_ENGINE[sampler].noise == "brownian" else fresh
    x = torch.randn(2, *shape, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run = Run(lambda x, _: x / 2, noise, lambda *_: None, lambda: x / 2, 1.0)
        sample(sampler, run, x, sigmas)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def accelerated(models_dir, kind):
    return LocalEngine(models_dir, device="cuda", dtype="fp16", memory="high", acceleration=kind)


def generate(engine, **fields):
    request = {"prompt": "an apple", "width": 128, "height": 128, "steps": 4, **fields}
    return engine.generate(GenerationRequest(**request)).images[0].rgba.astype(int)


@pytest.mark.parametrize(("kind", "difference"), [("graphs", 1), ("compile", 8)])
def test_accelerated_image_is_near_the_eager_image(models_dir, kind, difference):
    eager, fast = accelerated(models_dir, "off"), accelerated(models_dir, kind)
    # new prompts, a patch that is removed midway, and a new size
    for fields in (
        {},
        {"prompt": "a pear"},
        {"layerdiffuse_stop_at": 0.5},
        {"mode": "opaque"},
        {"width": 192},
    ):
        differences = np.abs(generate(eager, **fields) - generate(fast, **fields))
        assert np.mean(differences > difference) < 0.02, fields


def test_gpu_memory_is_released(models_dir):
    render(models_dir, "cuda", memory="low")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        render(models_dir, "cuda", memory="low")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20
