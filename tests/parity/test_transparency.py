"""The transparent decoder: size, blocks against diffusers, eight passes, 8-bit output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity import reference_pipeline
from tests.support import tiny_models
from tests.support.reference_decoder import ReferenceDecoder
from torch import nn

from alphalayer.catalog import EMBEDDED_MODEL
from alphalayer.core.errors import CorruptFile, InvalidRequest, LayerDiffuseMissing, ModelUnusable
from alphalayer.engine.networks.transparent import TransparentDecoder, TransparentEncoder
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.transparency.decode import (
    choose_passes,
    decode_transparent,
    decoder_inputs,
    load_decoder,
    lower_median,
    to_uint8,
)
from alphalayer.images.resampling import resize

# the network is a few hundred float32 operations deep, with values of about 1
NETWORK = {"rtol": 0, "atol": 2e-5}


EMBEDDED = EMBEDDED_MODEL / "layerdiffuse"


def _own(reference: ReferenceDecoder, config: dict) -> TransparentDecoder:
    with torch.device("meta"):
        network = TransparentDecoder(**config)
    NamedWeights(network).assign(reference.state_dict(), torch.float32)
    return network.eval()


@pytest.fixture(scope="module")
def decoder() -> TransparentDecoder:
    return _own(tiny_models.decoder(), tiny_models.DECODER)


def _assert_near(value: torch.Tensor, expected: torch.Tensor, share: float = 1e-6) -> None:
    """Compare within a share of the largest expected value."""
    largest = float(expected.abs().max())
    torch.testing.assert_close(value, expected, rtol=0, atol=share * largest)


def _inputs(height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixel = torch.rand(1, 3, height, width, generator=generator)
    return pixel, torch.randn(1, 4, height // 8, width // 8, generator=generator)


# --- the published network


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return NamedWeights(TransparentDecoder()).shapes()


def test_decoder_has_the_published_size(published):
    assert len(published) == 538
    assert sum(int(np.prod(shape)) for shape in published.values()) == 104_104_804


def test_decoder_has_the_published_shapes(published):
    expected = {
        "conv_in.weight": (32, 3, 3, 3),
        "latent_conv_in.weight": (64, 4, 1, 1),
        "down_blocks.5.downsamplers.0.conv.weight": (512, 512, 3, 3),
        "down_blocks.4.attentions.1.to_out.0.weight": (256, 256),
        "mid_block.attentions.0.group_norm.weight": (512,),
        "conv_norm_out.weight": (32,),
        "conv_out.weight": (4, 32, 3, 3),
    }
    entering = [
        (1024, 1024, 1024), (1024, 1024, 768), (768, 512, 384), (384, 256, 192), (192, 128, 96),
        (96, 64, 64), (64, 64, 64),
    ]  # fmt: skip
    leaving = (512, 512, 256, 128, 64, 32, 32)
    for i, (inputs, out) in enumerate(zip(entering, leaving, strict=True)):
        for j, channels in enumerate(inputs):
            expected[f"up_blocks.{i}.resnets.{j}.conv1.weight"] = (out, channels, 3, 3)
    assert {name: published[name] for name in expected} == expected
    with_attention = {name.split(".attentions")[0] for name in published if ".attentions." in name}
    assert with_attention == {
        "mid_block",
        *(f"down_blocks.{i}" for i in (4, 5, 6)),
        *(f"up_blocks.{i}" for i in (0, 1, 2)),
    }
    assert not any("time_emb" in name for name in published)


# --- one pass


CONFIGS = {
    "published depth": {"block_out_channels": [8, 8, 16, 24, 32, 40, 40]},
    "embedded": json.loads((EMBEDDED / "config.json").read_text())["decoder_config"],
    "trained on squares": {
        "in_channels": 48,
        "out_channels": 64,
        "block_out_channels": [16, 24, 32],
        "layers_per_block": 1,
        "attention_blocks": 0,
        "latent_block": 2,
        "norm_num_groups": 8,
    },
}


def _pair(config: dict) -> tuple[TransparentDecoder, ReferenceDecoder, tuple[torch.Tensor, ...]]:
    torch.manual_seed(5)
    reference = ReferenceDecoder(**config)
    network = _own(reference, config)
    height, width = network.multiple_of, 2 * network.multiple_of
    pixel = torch.rand(2, network.conv_in.in_channels, height, width)
    latent = torch.randn(2, 4, height >> network.latent_block, width >> network.latent_block)
    return network, reference, (pixel, latent)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_decoder_equals_the_blocks_of_diffusers(config: dict):
    """Compare to 1e-6 of the largest value, because q, k and v are one product."""
    network, reference, inputs = _pair(config)
    _assert_near(network(*inputs), reference(*inputs))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_equal_those_of_diffusers(config: dict):
    """Compare in float64, because gradients sum rounding errors over all pixels and layers."""
    network, reference, inputs = _pair(config)
    inputs = tuple(values.double() for values in inputs)
    for module in (network, reference):
        output = module.double().requires_grad_(True)(*inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for weight in network.parameters():
        weight.data = weight.grad
    gradients = NamedWeights(network)
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    assert set(gradients) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12 * largest)


def test_decoder_equals_diffusers_with_the_embedded_weights():
    config = CONFIGS["embedded"]
    network = load_decoder(
        EMBEDDED / "decoder.safetensors", config, memory_format=torch.channels_last
    )
    reference = ReferenceDecoder(**config)
    reference.load_state_dict(load_file(EMBEDDED / "decoder.safetensors"))
    pixel, latent = _inputs(64, 48)
    with torch.no_grad():
        _assert_near(network(pixel, latent), reference(pixel, latent), 1e-5)
        in_one_format = network.to(memory_format=torch.contiguous_format)
        _assert_near(in_one_format(pixel, latent), reference(pixel, latent))


@torch.no_grad()
def test_decoder_pass_equals_plain_functions(decoder: TransparentDecoder):
    pixel, latent = _inputs()
    expected = reference_pipeline.decoder(
        dict(NamedWeights(decoder)), tiny_models.DECODER, pixel, latent
    )
    torch.testing.assert_close(decoder(pixel, latent), expected, **NETWORK)


@torch.no_grad()
def test_decoder_pass_depends_on_the_latent(decoder: TransparentDecoder):
    pixel, latent = _inputs()
    assert (decoder(pixel, latent) - decoder(pixel, torch.zeros_like(latent))).abs().max() > 1e-3


# --- eight passes


def _loop(decoder: TransparentDecoder, pixel: torch.Tensor, latent: torch.Tensor) -> np.ndarray:
    """Run pass by pass in NumPy, and return the fourth smallest of eight."""
    results = []
    for flip in (False, True):
        for turns in range(4):
            turned = []
            for tensor in (pixel, latent):
                array = tensor.numpy()[..., ::-1] if flip else tensor.numpy()
                turned.append(torch.from_numpy(np.rot90(array, turns, (2, 3)).copy()))
            with torch.no_grad():
                result = np.clip(decoder(*turned).numpy(), 0, 1)
            result = np.rot90(result, -turns, (2, 3))
            results.append(result[..., ::-1] if flip else result)
    return np.sort(np.stack(results), axis=0)[3]


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
@pytest.mark.parametrize("passes_at_once", [1, 3, 8])
def test_decode_is_the_lower_median_of_eight_passes(
    decoder: TransparentDecoder, size: tuple[int, int], passes_at_once: int
):
    pixel, latent = _inputs(*size)
    result = decode_transparent(decoder, pixel, latent, passes_at_once)
    assert result.shape == (1, 4, *size)
    np.testing.assert_allclose(result, _loop(decoder, pixel, latent), **NETWORK)


@pytest.mark.parametrize(
    ("side", "limit", "passes"), [(64, 8, 8), (128, 8, 4), (256, 8, 2), (64, 2, 2), (256, 1, 1)]
)
def test_passes_at_once_follow_weights_and_activations(side: int, limit: int, passes: int):
    """Check the published decoder, whose weights count most for a small image."""
    with torch.device("meta"):
        published, pixel = TransparentDecoder(), torch.empty(1, 3, side, side)
    assert choose_passes(published, pixel, limit) == limit  # not on a CPU
    published.conv_in.to_empty(device="cpu")
    assert choose_passes(published, pixel, limit) == passes


def test_decode_differs_from_a_single_pass(decoder: TransparentDecoder):
    pixel, latent = _inputs()
    result = decode_transparent(decoder, pixel, latent).clone()
    with torch.no_grad():
        single = decoder(pixel, latent).clamp(0, 1)
    assert (result - single).abs().max() > 1e-3


def test_decode_of_a_rotated_input_is_rotated(decoder: TransparentDecoder):
    pixel, latent = _inputs()
    turned = decode_transparent(decoder, pixel.rot90(1, (2, 3)), latent.rot90(1, (2, 3)))
    torch.testing.assert_close(
        turned, decode_transparent(decoder, pixel, latent).rot90(1, (2, 3)), **NETWORK
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", range(1, 10))
def test_lower_median_equals_the_median_of_torch(count: int, dtype: torch.dtype):
    values = torch.rand(count, 4, 64, 64, generator=torch.Generator().manual_seed(count))
    values[..., :32] = (values[..., :32] * 5).round() / 5  # half of them with ties
    values = values.to(dtype)
    expected = values.median(dim=0).values
    assert torch.equal(lower_median(list(values.clone())), expected)


def test_decode_of_unfitting_sizes_is_refused(decoder: TransparentDecoder):
    with pytest.raises(InvalidRequest, match="20x16"):
        decode_transparent(decoder, torch.zeros(1, 3, 16, 20), torch.zeros(1, 4, 2, 2))
    with pytest.raises(ModelUnusable, match=r"4x2x2.*8x2x2"):
        decode_transparent(decoder, torch.zeros(1, 3, 16, 16), torch.zeros(1, 8, 2, 2))


# --- in and out


def test_official_inputs_are_vae_latent_and_float_pixels():
    sample = torch.tensor([-2.0, -1.0, 0.005, 1.5]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    pixel, latent = decoder_inputs(
        sample, torch.full((1, 4, 1, 1), 2.0), 0.13025, "official", shift_factor=0.5
    )
    np.testing.assert_allclose(pixel[0, 0, 0], [0, 0, 0.5025, 1], rtol=1e-6)
    np.testing.assert_allclose(latent, np.full((1, 4, 1, 1), 2 / 0.13025 + 0.5), rtol=1e-6)


def test_forge2_inputs_are_sampler_latent_and_8_bit_pixels():
    sample = torch.tensor([-2.0, 0.005, 0.9999, 1.5]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    sampled = torch.full((1, 4, 1, 1), 2.0)
    pixel, latent = decoder_inputs(sample, sampled, 0.13025, "forge2", shift_factor=0.5)
    np.testing.assert_allclose(pixel[0, 0, 0] * 255, [0, 128, 254, 255], rtol=1e-6)
    assert torch.equal(latent, sampled)


def test_to_uint8_truncates_and_puts_alpha_last():
    decoded = torch.tensor([0.999, 0.0, 0.5, 1.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 3)
    rgba = to_uint8(decoded)
    assert rgba.shape == (2, 3, 4)
    assert rgba.dtype == np.uint8
    assert rgba[1, 2].tolist() == [0, 127, 255, 254]


def test_to_uint8_clamps_values_outside_0_to_1():
    assert to_uint8(torch.tensor([-0.3, 1.7, 0.0, 1.0]).reshape(1, 4, 1, 1))[0, 0].tolist() == [
        255,
        0,
        255,
        0,
    ]


def test_to_uint8_multiplies_float16_in_float16():
    """Check that 131 of the 15,361 float16 values in [0, 1] differ by 1 from float32."""
    values = torch.arange(0x3C00 + 1, dtype=torch.int16).view(torch.float16)
    assert len(values) == 15_361
    assert values[-1] == 1
    row = values.reshape(1, 1, 1, -1).expand(1, 4, 1, -1)
    half, single = to_uint8(row)[0, :, 0].astype(int), to_uint8(row.float())[0, :, 0].astype(int)
    assert (half != single).sum() == 131
    assert np.abs(half - single).max() == 1


# --- transparent encoder


def _test_image(side: int) -> np.ndarray:
    """Return the RGBA image T(side, side) of the test vectors, float32 in [0, 1]."""
    y, x = np.mgrid[:side, :side]
    alpha = (3136 - (2 * x - side + 1) ** 2 - (2 * y - side + 1) ** 2) // 8
    planes = (4 * x % 256, 4 * y % 256, 2 * (x + y) % 256, alpha.clip(0, 255))
    return np.stack(planes, axis=-1).astype(np.float32) / 255


def _spread(rgba: np.ndarray) -> np.ndarray:
    """Return colours that go on below transparent pixels, as LayerDiffuse spreads them."""
    levels = [np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)]
    while min(levels[-1].shape[:2]) > 1:
        height, width = levels[-1].shape[:2]
        levels.append(resize(levels[-1], (int(width / 1.2), int(height / 1.2))))
    total = levels[-1].sum(axis=(0, 1))
    colours = torch.tensor(total[:3] / max(total[3], 1e-8)).reshape(1, 3, 1, 1)
    for level in reversed(levels):
        colours = nn.functional.interpolate(colours, level.shape[:2], mode="bilinear")
        premultiplied, alpha = torch.from_numpy(level).permute(2, 0, 1)[None].split([3, 1], dim=1)
        colours = premultiplied + colours * (1 - alpha)
    return colours[0].permute(1, 2, 0).numpy()


def test_encoder_reproduces_published_code():
    """Compare with numbers that the published code computed from weights of NumPy's generator."""
    generator, weights = np.random.RandomState(1234), {}
    encoder = TransparentEncoder()
    for name, shape in NamedWeights(encoder).shapes().items():
        values = generator.standard_normal(int(np.prod(shape))).reshape(shape)
        scaled = values / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else values * 0.1
        weights[name] = torch.from_numpy(scaled.astype(np.float32))
    NamedWeights(encoder).assign(weights, torch.float32)
    rgba = _test_image(64)
    assert (rgba[..., 3] * 255).sum() == 422_616
    colours = _spread(rgba)
    np.testing.assert_allclose(colours[10, 50], [0.676313, 0.281915, 0.479114], atol=1e-5)
    np.testing.assert_allclose(colours.mean((0, 1)), [0.494119, 0.494117, 0.494119], atol=1e-5)
    argb = np.concatenate([rgba[..., 3:], colours], axis=-1)
    offset = encoder(torch.from_numpy(argb).permute(2, 0, 1)[None])
    assert offset.shape == (1, 4, 8, 8)
    for (y, x), expected in {
        (0, 0): (-0.020503, -0.199060, -0.046485, 0.004707),
        (4, 4): (0.015969, -0.107658, -0.101376, 0.080967),
        (7, 2): (-0.040212, -0.138714, -0.126050, 0.027474),
    }.items():
        np.testing.assert_allclose(offset[0, :, y, x], expected, rtol=0, atol=1e-5)
    assert float(offset.sum()) == pytest.approx(-10.826385, rel=1e-4)
    assert float(offset.abs().sum()) == pytest.approx(19.555880, rel=1e-4)


# --- files


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_load_decoder_infers_the_sizes(
    decoder: TransparentDecoder, tmp_path: Path, dtype: torch.dtype
):
    file = tmp_path / "decoder.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in NamedWeights(decoder).items()}, file)
    # group and head sizes cannot be seen in shapes
    config = {"norm_num_groups": 4, "attention_head_dim": 8}
    loaded = load_decoder(file, config, memory_format=torch.channels_last)
    assert not loaded.training
    assert not any(tensor.requires_grad for tensor in loaded.parameters())
    assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    pixel, latent = _inputs()
    torch.testing.assert_close(loaded(pixel, latent), decoder(pixel, latent), **NETWORK)


def test_load_decoder_missing_or_damaged_file_is_named(decoder: TransparentDecoder, tmp_path: Path):
    file = tmp_path / "decoder.safetensors"
    with pytest.raises(LayerDiffuseMissing, match=r"decoder\.safetensors"):
        load_decoder(file)
    save_file(dict(NamedWeights(decoder)), file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CorruptFile, match=r"decoder\.safetensors"):
        load_decoder(file)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("diffusion_model.out.2.weight::lora::0", "a LayerDiffuse patch"),
        ("model.diffusion_model.out.2.weight", "a Stable Diffusion checkpoint"),
        ("blocks.16.weight", "a transparent encoder"),
        ("nonsense", "1 unknown tensors"),
    ],
)
def test_load_decoder_names_another_kind_of_file(tmp_path: Path, key: str, kind: str):
    file = tmp_path / "decoder.safetensors"
    save_file({key: torch.zeros(1)}, file)
    with pytest.raises(ModelUnusable, match=f"holds {kind}"):
        load_decoder(file)


@pytest.mark.parametrize(
    "config", [{"block_out_channels": [8, 8]}, {"unknown": 1}, {"latent_block": 9}]
)
def test_load_decoder_unfitting_config_is_refused(
    decoder: TransparentDecoder, tmp_path: Path, config: dict
):
    file = tmp_path / "decoder.safetensors"
    save_file(dict(NamedWeights(decoder)), file)
    with pytest.raises(ModelUnusable, match=r"decoder\.safetensors"):
        load_decoder(file, json.loads(json.dumps(config)))
