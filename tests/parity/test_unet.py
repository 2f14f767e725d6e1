"""The UNet against diffusers: values, gradients, operations of a call.

In float64 the difference is rounding alone, far below what a wrong operation would give. In float32
it is at most 2e-6 of the largest value: fused products add their terms in another order.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from tests.support.operations import OperationCounter, flash_attention
from tests.support.seeded_weights import seeded_weights

from alphalayer.catalog import EMBEDDED_MODEL
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.networks.unet import UNet, UNetConfig
from alphalayer.engine.networks.weights import NamedWeights

SDXL = json.loads((SHIPPED / "unet" / "config.json").read_text())
CONFIGS: dict[str, dict[str, Any]] = {
    "SDXL, narrow": SDXL
    | {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 2],
        "cross_attention_dim": 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "SD 1.5, narrow": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64, 96, 96],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 40,
    },
    "embedded": json.loads((EMBEDDED_MODEL / "unet" / "config.json").read_text()),
}


@cache
@torch.inference_mode(False)
def make_pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[UNet2DConditionModel, UNet]:
    """Return a random UNet of diffusers, and ours with its weights. Tests do not change them."""
    config = CONFIGS[name]
    torch.manual_seed(0)
    reference = UNet2DConditionModel.from_config(config).to(dtype).eval()
    with torch.device("meta"):
        unet = UNet(UNetConfig.of(config))
    NamedWeights(unet).assign(reference.state_dict(), dtype)
    return reference, unet


def make_inputs(unet: UNet, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return latents that are not square, the timestep, encoded text and pooled text."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 32, 24, generator=generator, dtype=dtype),
        torch.tensor([801.0]),
        torch.randn(2, 77, unet.config.context, generator=generator, dtype=dtype),
        torch.randn(2, unet.config.pooled, generator=generator, dtype=dtype),
    )


SIZES = (256, 192, 0, 8, 256, 184)


def run_reference(reference: UNet2DConditionModel, inputs: tuple[torch.Tensor, ...]):
    x, timestep, context, pooled = inputs
    return reference(
        x,
        timestep.expand(len(x)),
        context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([SIZES] * 2).float()},
        return_dict=False,
    )[0]


def run(unet: UNet, inputs: tuple[torch.Tensor, ...], condition: torch.Tensor | None = None):
    x, timestep, context, pooled = inputs
    return unet(x, timestep, unet.prepare(context, pooled, SIZES), condition)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@torch.inference_mode()
def test_unet_equals_diffusers(config: str, dtype: torch.dtype, tolerance: float):
    reference, unet = make_pair(config, dtype)
    inputs = make_inputs(unet, dtype)
    expected = run_reference(reference, inputs)
    difference = (run(unet, inputs) - expected).abs().max()
    assert difference <= tolerance * expected.abs().max()


@torch.inference_mode()
def test_random_sd15_unet_gives_known_values():
    """Weights and inputs come from seeds, and the values from diffusers on another machine."""
    sizes = CONFIGS["SD 1.5, narrow"] | {
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
    }
    with torch.device("meta"):
        unet = UNet(UNetConfig.of(sizes))
        shapes = {
            name: tensor.shape
            for name, tensor in UNet2DConditionModel.from_config(sizes).state_dict().items()
        }
    weights = seeded_weights(shapes, 100)
    assert len(weights) == 686
    assert sum(weight.numel() for weight in weights.values()) == 5_439_396
    NamedWeights(unet).assign(weights, torch.float32)
    numbers = np.random.RandomState(102)
    x, context = (
        torch.from_numpy(numbers.standard_normal(shape)).float()
        for shape in ((6, 4, 8, 8), (6, 5, 24))
    )
    output = run(unet, (x, torch.tensor([500.0]), context, torch.empty(6, 0))).double()
    first = torch.tensor([-0.343699, -0.427626, -0.411297, 0.012965], dtype=torch.double)
    last = torch.tensor([0.340846, 0.415157, -0.025304], dtype=torch.double)
    tolerance = 1e-4 * output.abs().max()
    assert (output.flatten()[:4] - first).abs().max() < tolerance
    assert (output.flatten()[-3:] - last).abs().max() < tolerance
    assert output.sum().item() == pytest.approx(213.19350, rel=1e-4)
    assert output.abs().sum().item() == pytest.approx(737.39154, rel=1e-4)


@torch.inference_mode()
def test_odd_latent_sides_equal_diffusers():
    """Images of any multiple of 8 have latents that do not halve evenly."""
    reference, unet = make_pair("SDXL, narrow", torch.float64)
    inputs = make_inputs(unet, torch.float64)
    inputs = (torch.randn(2, 4, 17, 25, dtype=torch.float64), *inputs[1:])
    expected = run_reference(reference, inputs)
    assert (run(unet, inputs) - expected).abs().max() < 1e-12 * expected.abs().max()


@torch.inference_mode()
def test_channels_last_changes_rounding_only():
    _, unet = make_pair("SDXL, narrow")
    inputs = make_inputs(unet, torch.float32)
    expected = run(unet, inputs)
    other = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    assert (run(other, inputs) - expected).abs().max() <= 2e-6 * expected.abs().max()


@torch.inference_mode()
def test_condition_is_added_after_the_first_convolution():
    _, unet = make_pair("SDXL, narrow")
    inputs = make_inputs(unet, torch.float32)
    condition = torch.randn(2, 32, 32, 24, generator=torch.Generator().manual_seed(2))
    conditioned = run(unet, inputs, condition)
    handle = unet.conv_in.register_forward_hook(lambda _module, _inputs, out: out + condition)
    assert torch.equal(conditioned, run(unet, inputs))
    handle.remove()
    assert not torch.equal(conditioned, run(unet, inputs))


@torch.inference_mode()
def test_prepared_rows_equal_rows_prepared_alone():
    _, unet = make_pair("SDXL, narrow")
    x, timestep, context, pooled = make_inputs(unet, torch.float32)
    both = unet.prepare(context, pooled, SIZES)
    second = unet(x[1:], timestep, both.rows(slice(1, 2)))
    assert (second - unet(x, timestep, both)[1:]).abs().max() <= 2e-6 * second.abs().max()


def test_gradients_equal_those_of_diffusers():
    reference, unet = make_pair.__wrapped__("embedded", torch.float64)
    unet.requires_grad_(True)
    inputs = make_inputs(unet, torch.float64)
    run_reference(reference, inputs).square().mean().backward()
    run(unet, inputs).square().mean().backward()
    fused = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv.weight.grad
    whole = reference.mid_block.attentions[0].transformer_blocks[0].attn1
    parts = [part.weight.grad for part in (whole.to_q, whole.to_k, whole.to_v)]
    assert torch.allclose(fused, torch.cat(parts), rtol=1e-9, atol=1e-15)
    first, expected = unet.conv_in.weight.grad, reference.conv_in.weight.grad
    assert torch.allclose(first, expected, rtol=1e-9, atol=1e-15)


@torch.no_grad()
def test_call_of_sdxl_launches_few_operations(monkeypatch: pytest.MonkeyPatch):
    # on the meta device attention would count as its parts; on a GPU it is one kernel
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    with torch.device("meta"):
        unet = UNet(UNetConfig.of(SDXL)).half()
        x = torch.empty(2, 4, 128, 128, dtype=torch.half)
        text = torch.empty(2, 77, 2048, dtype=torch.half), torch.empty(2, 1280, dtype=torch.half)
        prepared, timestep = unet.prepare(*text, (1024,) * 6), torch.empty(1)
        with OperationCounter() as counter:
            unet(x, timestep, prepared)
    assert sum(counter.launches.values()) == 1363
    assert counter.launches["aten::mm"] + counter.launches["aten::addmm"] == 445
    assert counter.launches["alphalayer_tests::flash_attention"] == 140
    assert not counter.launches.keys() & {"aten::div", "aten::_local_scalar_dense", "aten::item"}
