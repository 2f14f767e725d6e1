"""The transparent decoder: size, blocks against diffusers, eight passes, 8-bit output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import save_file
from tests.parity import reference_pipeline
from tests.support import tiny_models
from torch import nn

from alphalayer.core.errors import CorruptFile, InvalidRequest, LayerDiffuseMissing, ModelUnusable
from alphalayer.engine.transparency.decode import (
    TransparentDecoder,
    decode_transparent,
    decoder_inputs,
    load_decoder,
    to_uint8,
)

# the network is a few hundred float32 operations deep, with values of about 1
NETWORK = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def decoder() -> TransparentDecoder:
    return tiny_models.decoder()


def _inputs(height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixel = torch.rand(1, 3, height, width, generator=generator)
    return pixel, torch.randn(1, 4, height // 8, width // 8, generator=generator)


# --- the published network


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape) for name, tensor in TransparentDecoder().state_dict().items()
        }


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


class _Straight(nn.Module):
    """Network of the paper's appendix in the smallest modules of diffusers, for tiny sizes."""

    def __init__(self, config: dict):
        super().__init__()
        widths, groups, head = (
            config["block_out_channels"],
            config["norm_num_groups"],
            config["attention_head_dim"],
        )
        attended, layers, last = (
            config["attention_blocks"],
            config["layers_per_block"],
            len(widths) - 1,
        )
        self.latent_block = config["latent_block"]

        def resnet(a: int, b: int) -> nn.Module:
            return ResnetBlock2D(
                in_channels=a, out_channels=b, temb_channels=None, groups=groups, eps=1e-5
            )

        def attention(channels: int) -> nn.Module:
            return Attention(
                channels, heads=channels // head, dim_head=head, eps=1e-5, norm_num_groups=groups,
                residual_connection=True, bias=True, upcast_softmax=True,
            )  # fmt: skip

        def block(
            resnets: list[nn.Module], attentions: list[nn.Module], **sampler: nn.Module
        ) -> nn.Module:
            result = nn.Module()
            result.resnets = nn.ModuleList(resnets)
            if attentions:
                result.attentions = nn.ModuleList(attentions)
            for name, module in sampler.items():
                setattr(result, name, nn.ModuleList([module]))
            return result

        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.latent_conv_in = nn.Conv2d(4, widths[self.latent_block - 1], 1)
        self.down_blocks, skips, at = nn.ModuleList(), [widths[0]], widths[0]
        for i, width in enumerate(widths):
            resnets = [resnet(at if j == 0 else width, width) for j in range(layers)]
            attentions = [attention(width) for _ in resnets] if i > last - attended else []
            sampler = (
                {"downsamplers": Downsample2D(width, use_conv=True, padding=1, name="op")}
                if i < last
                else {}
            )
            self.down_blocks.append(block(resnets, attentions, **sampler))
            skips += [width] * (layers + len(sampler))
            at = width
        self.mid_block = block([resnet(at, at), resnet(at, at)], [attention(at)])
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths[::-1]):
            resnets = []
            for _ in range(layers + 1):
                resnets.append(resnet(at + skips.pop(), width))
                at = width
            attentions = [attention(width) for _ in resnets] if i < attended else []
            sampler = {"upsamplers": Upsample2D(width, use_conv=True)} if i < last else {}
            self.up_blocks.append(block(resnets, attentions, **sampler))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], 4, 3, padding=1)

    def forward(self, pixel: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(pixel)
        skips = [h]
        for i, down in enumerate(self.down_blocks):
            h = h + self.latent_conv_in(latent) if i == self.latent_block else h
            for j, resnet in enumerate(down.resnets):
                h = resnet(h, None)
                h = down.attentions[j](h) if hasattr(down, "attentions") else h
                skips.append(h)
            if hasattr(down, "downsamplers"):
                h = down.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block.resnets[1](
            self.mid_block.attentions[0](self.mid_block.resnets[0](h, None)), None
        )
        for up in self.up_blocks:
            for j, resnet in enumerate(up.resnets):
                h = resnet(torch.cat([h, skips.pop()], dim=1), None)
                h = up.attentions[j](h) if hasattr(up, "attentions") else h
            h = up.upsamplers[0](h) if hasattr(up, "upsamplers") else h
        return self.conv_out(nn.functional.silu(self.conv_norm_out(h)))


@torch.no_grad()
def test_decoder_pass_equals_modules_of_diffusers(decoder: TransparentDecoder):
    straight = _Straight(tiny_models.DECODER).eval()
    state = decoder.state_dict()
    # diffusers' old downsampler holds its convolution under two names
    state |= {
        name.replace(".conv.", ".op."): tensor
        for name, tensor in state.items()
        if "downsamplers" in name
    }
    left_over = straight.load_state_dict(state, strict=False)
    assert not left_over.missing_keys
    pixel, latent = _inputs()
    torch.testing.assert_close(decoder(pixel, latent), straight(pixel, latent), **NETWORK)


@torch.no_grad()
def test_decoder_pass_equals_plain_functions(decoder: TransparentDecoder):
    pixel, latent = _inputs()
    expected = reference_pipeline.decoder(decoder.state_dict(), tiny_models.DECODER, pixel, latent)
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


# --- files


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_load_decoder_infers_the_sizes(
    decoder: TransparentDecoder, tmp_path: Path, dtype: torch.dtype
):
    file = tmp_path / "decoder.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in decoder.state_dict().items()}, file)
    # group and head sizes cannot be seen in shapes
    loaded = load_decoder(file, {"norm_num_groups": 4, "attention_head_dim": 8})
    assert not loaded.training
    assert not any(tensor.requires_grad for tensor in loaded.parameters())
    pixel, latent = _inputs()
    assert torch.equal(loaded(pixel, latent), decoder(pixel, latent))


def test_load_decoder_missing_or_damaged_file_is_named(decoder: TransparentDecoder, tmp_path: Path):
    file = tmp_path / "decoder.safetensors"
    with pytest.raises(LayerDiffuseMissing, match=r"decoder\.safetensors"):
        load_decoder(file)
    save_file(decoder.state_dict(), file)
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
    save_file(decoder.state_dict(), file)
    with pytest.raises(ModelUnusable, match=r"decoder\.safetensors"):
        load_decoder(file, json.loads(json.dumps(config)))
