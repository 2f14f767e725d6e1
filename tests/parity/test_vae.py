"""The VAEs against diffusers' in float32, the names of their files, and errors of files."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderDC as ReferenceDC
from diffusers import AutoencoderKL as ReferenceKL
from safetensors.torch import load_file
from tests.support import tiny_models
from torch import Tensor
from torch.testing import assert_close
from training.autoencoder import make_vae

from alphalayer.catalog import EMBEDDED_MODEL
from alphalayer.engine.families.vae import Vae, read_vae
from alphalayer.engine.families.vae_names import from_diffusers, from_ldm

FLOAT32_ROUNDING = 1e-6
"""Largest difference as a share of the largest value: q, k and v are one product here.

A larger product may sum in another order.
"""
EMBEDDED_CONFIG = json.loads((EMBEDDED_MODEL / "vae" / "config.json").read_text())
EMBEDDED_WEIGHTS = load_file(EMBEDDED_MODEL / "vae" / "diffusion_pytorch_model.safetensors")


def _randomise(network: torch.nn.Module) -> None:
    """Give normalisations weights and biases that matter."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


def _kl(**changes) -> ReferenceKL:
    """Return a random VAE with the levels of SDXL."""
    torch.manual_seed(0)
    network = ReferenceKL(
        **{
            "block_out_channels": (32, 64, 96, 96),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            **changes,
        }
    )
    _randomise(network)
    return network.eval()


def _embedded() -> ReferenceDC:
    network = ReferenceDC.from_config(EMBEDDED_CONFIG)
    network.load_state_dict(EMBEDDED_WEIGHTS)
    return network.eval()


def _next_embedded() -> ReferenceDC:
    torch.manual_seed(0)
    network = make_vae()
    _randomise(network)
    return network.eval()


def _ours(reference: ReferenceKL | ReferenceDC) -> Vae:
    config = json.loads(reference.to_json_string())
    return read_vae(reference.state_dict(), config, torch.float32)


def _assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = FLOAT32_ROUNDING * float(expected.abs().max())
    assert_close(actual, expected, rtol=0, atol=tolerance)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# --- equality with diffusers


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="sdxl"),
        pytest.param(
            {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
            id="16-channels-without-quant-convs",
        ),
        pytest.param(
            {
                "block_out_channels": (32, 48),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "layers_per_block": 1,
                "norm_num_groups": 16,
            },
            id="two-levels",
        ),
    ],
)
@torch.inference_mode()
def test_kl_equals_diffusers(changes):
    reference = _kl(**changes)
    ours = _ours(reference)
    assert ours.latent_channels == reference.config["latent_channels"]
    assert ours.cell == 2 ** (len(reference.config["block_out_channels"]) - 1)
    rgb, latent = _random(2, 3, 64, 96), _random(2, ours.latent_channels, 8, 12)
    _assert_near(ours.encode(rgb), reference.encode(rgb).latent_dist.mean)
    _assert_near(ours.decode(latent), reference.decode(latent).sample)


@pytest.mark.parametrize("make", [_embedded, _next_embedded])
@torch.inference_mode()
def test_dc_equals_diffusers(make):
    reference = make()
    ours = _ours(reference)
    assert ours.latent_channels == 4
    assert ours.cell == reference.spatial_compression_ratio
    rgb, latent = _random(2, 3, 64, 96), _random(2, 4, 8, 12)
    _assert_near(ours.encode(rgb), reference.encode(rgb).latent)
    _assert_near(ours.decode(latent), reference.decode(latent).sample)


@torch.inference_mode()
def test_dc_adds_the_offset_to_the_latent():
    ours = _ours(_embedded())
    rgb, offset = _random(1, 3, 16, 16), _random(1, 4, 2, 2)
    assert torch.equal(ours.encode(rgb, offset), ours.encode(rgb) + offset)


@pytest.mark.parametrize("make", [_embedded, _next_embedded])
def test_gradients_of_dc_equal_diffusers(make):
    reference = make()
    ours = _ours(reference).requires_grad_(True)
    rgb = _random(1, 3, 32, 48)
    reference.decode(reference.encode(rgb).latent).sample.square().mean().backward()
    ours.decode(ours.encode(rgb)).square().mean().backward()
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    for name, weight in reference.named_parameters():
        _assert_near(gradients[name], weight.grad)


@torch.inference_mode()
def test_dc_in_bfloat16_stays_near_float32():
    reference = _embedded()
    ours = read_vae(reference.state_dict(), EMBEDDED_CONFIG, torch.bfloat16)
    latent = _random(1, 4, 8, 12).bfloat16()
    decoded, expected = ours.decode(latent), reference.decode(latent.float()).sample
    assert decoded.dtype == torch.bfloat16
    # 8 bits of mantissa, some 20 layers
    assert (decoded.float() - expected).abs().mean() < 0.03 * expected.std()


# --- names of files


def test_names_of_ldm_files_become_canonical():
    reference = tiny_models.vae()
    file = tiny_models.single_file_tensors(
        *tiny_models.text_encoders(), tiny_models.unet(), reference
    )
    file["first_stage_model.loss.logvar"] = torch.zeros(())
    renamed = from_ldm(file)
    expected = reference.state_dict()
    assert renamed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(renamed[name], tensor), name


def test_old_names_of_the_attention_become_canonical():
    expected = _kl().state_dict()
    old = {}
    for name, tensor in expected.items():
        for new, short in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f".{new}.", f".{short}.")
        old[name] = tensor
    assert sum(".proj_attn." in name for name in old) == 4
    renamed = from_diffusers(old)
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in expected.items())


# --- errors


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match=r"AutoencoderTiny; supported: AutoencoderKL, Auto"):
        read_vae({}, {"_class_name": "AutoencoderTiny"}, torch.float32)


def test_unsupported_entry_of_the_config_is_refused():
    config = EMBEDDED_CONFIG | {"decoder_in_shortcut": True}
    with pytest.raises(ValueError, match="decoder_in_shortcut: True; supported: False"):
        read_vae(EMBEDDED_WEIGHTS, config, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.conv_in.bias": None}, "decoder.conv_in.bias is missing"),
        (
            {"decoder.conv_in.bias": torch.zeros(5)},
            "decoder.conv_in.bias has the shape 5, expected 128",
        ),
    ],
)
def test_tensors_that_do_not_match_are_named(changes, message):
    tensors = {
        name: tensor for name, tensor in (EMBEDDED_WEIGHTS | changes).items() if tensor is not None
    }
    with pytest.raises(ValueError, match=message):
        read_vae(tensors, EMBEDDED_CONFIG, torch.float32)
