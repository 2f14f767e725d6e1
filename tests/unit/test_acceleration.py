"""Recorded calls of the UNet: inputs, changed text, changed weights, dropped recordings.

On the CPU a call is "recorded" by a function that repeats it on the same memory, as a CUDA graph
does. The tests of CUDA graphs are in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.support.small_unet import CONFIG
from torch import Tensor

from alphalayer.core.errors import SetupFailed
from alphalayer.engine.acceleration import (
    MAX_RECORDINGS,
    GraphRunner,
    Replay,
    check_acceleration,
)
from alphalayer.engine.networks.unet import Prepared, UNet


class Recorder:
    """Recorder whose replays write into the memory of the recorded output."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.recorded += 1
        output = call()
        return lambda: output.copy_(call()), output


@pytest.fixture(params=["SDXL", "SD 1.5"])
def unet(request: pytest.FixtureRequest) -> UNet:
    config = replace(CONFIG, pooled=0, size_width=0, conv_projections=True)
    torch.manual_seed(0)
    return UNet(CONFIG if request.param == "SDXL" else config).eval().requires_grad_(False)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def runner(unet: UNet, recorder: Recorder) -> GraphRunner:
    return GraphRunner(unet, unet, recorder)


def make_text(unet: UNet, seed: int, tokens: int = 77) -> Prepared:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(2, tokens, 16, generator=generator)
    return unet.prepare(context, torch.randn(2, 8, generator=generator), (64,) * 6)


def make_latents(seed: int, side: int = 8) -> Tensor:
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(seed))


TIME, LATER = torch.tensor([801.0]), torch.tensor([33.0])


def test_replays_equal_calls_with_new_inputs(unet: UNet, runner: GraphRunner, recorder: Recorder):
    first, second = make_text(unet, 1), make_text(unet, 2)
    for i, (text, time) in enumerate(
        [(first, TIME), (first, LATER), (second, TIME), (first, TIME)]
    ):
        x = make_latents(i)
        assert torch.equal(runner(x, time, text, None), unet(x, time, text))
    assert recorder.recorded == 1


def test_output_survives_the_next_replay(unet: UNet, runner: GraphRunner):
    text = make_text(unet, 1)
    output = runner(make_latents(1), TIME, text, None)
    kept = output.clone()
    runner(make_latents(2), TIME, text, None)
    assert torch.equal(output, kept)


def test_condition_is_copied_into_the_recording(unet: UNet, runner: GraphRunner):
    text, x = make_text(unet, 1), make_latents(1)
    for seed in (3, 4):
        condition = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(runner(x, TIME, text, condition), unet(x, TIME, text, condition))
    assert torch.equal(runner(x, TIME, text, None), unet(x, TIME, text))


def test_patched_weights_count_without_a_new_recording(
    unet: UNet, runner: GraphRunner, recorder: Recorder
):
    text, x = make_text(unet, 1), make_latents(1)
    before = runner(x, TIME, text, None)
    unet.conv_out.weight.add_(1)
    after = runner(x, TIME, text, None)
    assert torch.equal(after, unet(x, TIME, text))
    assert not torch.equal(after, before)
    assert recorder.recorded == 1


def test_moved_weights_drop_the_recordings(unet: UNet, runner: GraphRunner, recorder: Recorder):
    text, x = make_text(unet, 1), make_latents(1)
    runner(x, TIME, text, None)
    unet.conv_in.weight = torch.nn.Parameter(unet.conv_in.weight * 2, requires_grad=False)
    assert torch.equal(runner(x, TIME, text, None), unet(x, TIME, text))
    assert recorder.recorded == 2


def test_replaced_attentions_drop_the_recordings(
    unet: UNet, runner: GraphRunner, recorder: Recorder
):
    text, x = make_text(unet, 1), make_latents(1)
    runner(x, TIME, text, None)
    unet.sharing = torch.nn.Identity()
    # another input image has another specification
    for spec in ("one", "one", "other"):
        unet.sharing.spec = spec  # pyright: ignore[reportArgumentType]
        runner(x, TIME, text, None)
    assert recorder.recorded == 3
    unet.sharing = None
    runner(x, TIME, text, None)
    assert recorder.recorded == 4


def test_each_shape_is_recorded_and_the_oldest_dropped(
    unet: UNet, runner: GraphRunner, recorder: Recorder
):
    for tokens in range(1, MAX_RECORDINGS + 2):
        runner(make_latents(1), TIME, make_text(unet, 1, tokens), None)
    assert recorder.recorded == MAX_RECORDINGS + 1
    runner(make_latents(1), TIME, make_text(unet, 1, MAX_RECORDINGS + 1), None)
    assert recorder.recorded == MAX_RECORDINGS + 1
    runner(make_latents(1), TIME, make_text(unet, 1, 1), None)
    assert recorder.recorded == MAX_RECORDINGS + 2


@pytest.mark.filterwarnings("ignore")
def test_unet_compiles_as_one_graph(unet: UNet):
    compiled = torch.compile(unet, backend="eager", fullgraph=True, dynamic=False)
    for seed in (1, 2):
        text, x = make_text(unet, seed), make_latents(seed)
        assert torch.allclose(compiled(x, TIME, text, None), unet(x, TIME, text), atol=1e-6)


@pytest.mark.parametrize("kind", ["graphs", "compile"])
def test_acceleration_without_cuda_is_refused(kind):
    with pytest.raises(SetupFailed, match="needs a CUDA GPU"):
        check_acceleration(kind, torch.device("cpu"))
    check_acceleration("off", torch.device("cpu"))
