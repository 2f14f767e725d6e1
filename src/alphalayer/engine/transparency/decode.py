"""Transparent decoder of LayerDiffuse: a decoded image and its latent become colour and alpha.

The network is a UNet without time embedding that receives the latent on its way down. It runs in
eight orientations, and the lower median is kept.

Source: Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent Transparency" (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from alphalayer.core.errors import (
    CommandHint,
    CorruptFile,
    InvalidRequest,
    LayerDiffuseMissing,
    ModelUnusable,
)
from alphalayer.core.request import DecodeMode
from alphalayer.engine.base import RgbaImage

ORIENTATIONS = tuple(product((False, True), range(4)))
"""The passes of one decode: mirrored left to right or not, then so many quarter turns."""


class TransparentDecoder(nn.Module):
    """UNet from pixels and a latent to alpha and colour.

    The defaults are the published network of 104,104,804 parameters. `attention_blocks` counts from
    the coarse end. The latent, convolved 1x1, is added just before down block `latent_block`, so it
    is 2^latent_block times smaller than the image.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 4,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (32, 32, 64, 128, 256, 512, 512),
        layers_per_block: int = 2,
        attention_blocks: int = 3,
        latent_block: int = 3,
        norm_num_groups: int = 4,
        attention_head_dim: int = 8,
    ):
        super().__init__()
        widths = list(block_out_channels)
        if not 0 <= latent_block < len(widths):
            raise ValueError(
                f"latent_block {latent_block} is not one of the {len(widths)} down blocks"
            )
        self.latent_block = latent_block
        self.multiple_of = 2 ** (len(widths) - 1)
        block: dict[str, Any] = {
            "temb_channels": None,
            "resnet_eps": 1e-5,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "attention_head_dim": attention_head_dim,
        }
        entering = [widths[0], *widths]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.latent_conv_in = nn.Conv2d(latent_channels, entering[latent_block], 1)
        self.down_blocks = nn.ModuleList(
            _down_blocks(widths, layers_per_block, attention_blocks, block)
        )
        self.mid_block = UNetMidBlock2D(widths[-1], **block)
        self.up_blocks = nn.ModuleList(
            _up_blocks(widths[::-1], layers_per_block + 1, attention_blocks, block)
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, pixel: Tensor, latent: Tensor) -> Tensor:
        """Run one pass.

        Args:
            pixel: Pixels (B, in_channels, H, W) in [0, 1]; H and W are multiples of `multiple_of`.
            latent: Latents (B, latent_channels, h, w).

        Returns:
            Alpha and colour (B, out_channels, H, W), about [0, 1].
        """
        sample = self.conv_in(pixel)
        skips: list[Tensor] = [sample]
        for i, block in enumerate(self.down_blocks):
            if i == self.latent_block:
                sample = sample + self.latent_conv_in(latent)
            sample, outputs = block(sample, None)
            skips += outputs
        sample = self.mid_block(sample, None)
        for block in self.up_blocks:
            taken = len(list(block.get_submodule("resnets").children()))
            sample, skips = block(sample, tuple(skips[-taken:]), None), skips[:-taken]
        return self.conv_out(nn.functional.silu(self.conv_norm_out(sample)))

    def check_sizes(self, pixel: Tensor, latent: Tensor) -> None:
        """Raise `InvalidRequest` or `ModelUnusable` for sizes that do not fit."""
        height, width = pixel.shape[-2:]
        if height % self.multiple_of or width % self.multiple_of:
            raise InvalidRequest(
                f"the transparent decoder cannot read an image of {width}x{height}.",
                hint=f"Use a width and height that are multiples of {self.multiple_of}.",
            )
        expected = (
            self.latent_conv_in.in_channels,
            height >> self.latent_block,
            width >> self.latent_block,
        )
        if tuple(latent.shape[1:]) != expected:
            raise ModelUnusable(
                f"the transparent decoder expects a latent of {_by(expected)} for an image of "
                f"{width}x{height}, and the model gives {_by(latent.shape[1:])}.",
                hint="Use the decoder that was made for this model's VAE.",
            )


def _down_blocks(
    widths: list[int], layers: int, attention_blocks: int, block: dict[str, Any]
) -> Iterator[nn.Module]:
    for i, (entering, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        yield get_down_block(
            "AttnDownBlock2D" if i >= len(widths) - attention_blocks else "DownBlock2D",
            num_layers=layers,
            in_channels=entering,
            out_channels=width,
            add_downsample=i < len(widths) - 1,
            downsample_padding=1,
            **block,
        )


def _up_blocks(
    widths: list[int], layers: int, attention_blocks: int, block: dict[str, Any]
) -> Iterator[nn.Module]:
    for i, width in enumerate(widths):
        yield get_up_block(
            "AttnUpBlock2D" if i < attention_blocks else "UpBlock2D",
            num_layers=layers,
            in_channels=widths[min(i + 1, len(widths) - 1)],
            out_channels=width,
            prev_output_channel=widths[max(i - 1, 0)],
            add_upsample=i < len(widths) - 1,
            **block,
        )


def decoder_inputs(
    vae_sample: Tensor,
    latent_scaled: Tensor,
    scaling_factor: float,
    mode: DecodeMode,
    shift_factor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the decoder's inputs: pixels in [0, 1] and a latent.

    Args:
        vae_sample: Output of the VAE (B, 3, H, W) in [-1, 1].
        latent_scaled: The sampler's latent (B, C, h, w).
        scaling_factor: Scale of the sampler's latent, see `LatentSpec`.
        mode: "official", as LayerDiffuse was published: float pixels and the VAE's own latent.
            "forge2", as later versions of Forge: pixels of 8 bit and the sampler's latent.
        shift_factor: Shift of the sampler's latent, see `LatentSpec`.
    """
    pixel = (vae_sample.float() / 2 + 0.5).clamp(0, 1)
    if mode == "forge2":
        return (pixel * 255).floor() / 255, latent_scaled
    return pixel, latent_scaled / scaling_factor + shift_factor


@torch.inference_mode()
def decode_transparent(
    decoder: TransparentDecoder, pixel: Tensor, latent: Tensor, passes_at_once: int = 8
) -> Tensor:
    """Decode pixels and a latent to alpha and straight colour.

    Args:
        decoder: The network.
        pixel: Pixels (1, 3, H, W) in [0, 1].
        latent: Latent (1, C, h, w).
        passes_at_once: Passes of one call. It trades memory for speed, and changes the result by
            rounding only. Quarter turns swap the sides, so an image that is not square takes at
            least two calls.

    Returns:
        Alpha, then straight RGB (1, 4, H, W) in [0, 1], in the decoder's dtype.

    Raises:
        InvalidRequest: A side is not a multiple of `decoder.multiple_of`.
        ModelUnusable: The latent has another shape than the decoder was made for.
    """
    decoder.check_sizes(pixel, latent)
    weight = decoder.conv_in.weight
    pixel, latent = (values.to(weight.device, weight.dtype) for values in (pixel, latent))
    results: list[Tensor] = []
    for batch in _batches(pixel.shape[-2] == pixel.shape[-1], passes_at_once):
        outputs = decoder(
            torch.cat([_turn(pixel, *way) for way in batch]),
            torch.cat([_turn(latent, *way) for way in batch]),
        )
        results += [
            _turn_back(output[None].clamp(0, 1), *way)
            for output, way in zip(outputs, batch, strict=True)
        ]
    # torch's median of an even count is the lower of the middle two, as in the published decoder
    return torch.stack(results).median(dim=0).values.clamp(0, 1)


def _batches(square: bool, at_once: int) -> Iterator[Sequence[tuple[bool, int]]]:
    """Yield the orientations in batches of equal shape."""
    upright, lying = (tuple(way for way in ORIENTATIONS if way[1] % 2 == odd) for odd in (0, 1))
    for group in [upright + lying] if square else [upright, lying]:
        for start in range(0, len(group), max(1, at_once)):
            yield group[start : start + max(1, at_once)]


def _turn(image: Tensor, flip: bool, turns: int) -> Tensor:
    return torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))


def _turn_back(image: Tensor, flip: bool, turns: int) -> Tensor:
    back = torch.rot90(image, -turns, (-2, -1))
    return back.flip(-1) if flip else back


def to_uint8(decoded: Tensor) -> RgbaImage:
    """Convert alpha and RGB (1, 4, H, W) in [0, 1] to RGBA (H, W, 4).

    Values are multiplied by 255 in the tensor's own dtype and truncated, as the published decoder
    does. With float16 that changes some values by one.
    """
    scaled = (decoded[0] * 255).float().clamp(0, 255).to(torch.uint8)
    return scaled[[1, 2, 3, 0]].permute(1, 2, 0).contiguous().cpu().numpy()


def to_opaque(rgb: Tensor) -> RgbaImage:
    """Convert RGB (1, 3, H, W) in [-1, 1] to opaque RGBA (H, W, 4) by truncation."""
    image = (
        ((rgb[0].float() + 1) / 2)
        .clamp(0, 1)
        .mul(255)
        .to(torch.uint8)
        .permute(1, 2, 0)
        .cpu()
        .numpy()
    )
    return np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)


def load_decoder(
    path: Path,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TransparentDecoder:
    """Read a decoder, frozen, from a safetensors file.

    Args:
        path: The file, in float16 or float32.
        config: Arguments of `TransparentDecoder`. Others are read from the shapes in the file, or
            are as published.
        dtype: Number format to run in.
        device: Device to run on.

    Raises:
        LayerDiffuseMissing: The file does not exist.
        CorruptFile: The file is not readable as safetensors.
        ModelUnusable: The file holds something else, or sizes that the config does not describe.
    """
    weights = read_weights(path)
    arguments = {
        **_sizes(weights),
        **{key: value for key, value in (config or {}).items() if key[0] != "_"},
    }
    try:
        with torch.device("meta"):
            decoder = TransparentDecoder(**arguments)
    except (TypeError, ValueError) as error:
        raise ModelUnusable(
            f"the decoder's config beside {path} does not describe a transparent decoder "
            f"({error}).",
            hint="Its keys are the sizes of the network, such as block_out_channels and "
            "latent_channels.",
        ) from error
    fit(decoder, weights, path, "the transparent decoder")
    return decoder.to(device, dtype)


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the sizes that a decoder's tensors show, or nothing for other tensors."""
    if "latent_conv_in.weight" not in weights:
        return {}
    levels = sorted(
        {int(name.split(".")[1]) for name in weights if name.startswith("down_blocks.")}
    )
    first = {
        name
        for name in weights
        if name.startswith("down_blocks.0.resnets.") and name.endswith("conv1.weight")
    }
    return {
        "block_out_channels": [
            len(weights[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in levels
        ],
        "layers_per_block": len(first),
        "attention_blocks": sum(
            f"down_blocks.{level}.attentions.0.to_q.weight" in weights for level in levels
        ),
        "latent_channels": weights["latent_conv_in.weight"].shape[1],
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto the CPU.

    Raises:
        LayerDiffuseMissing: The file does not exist.
        CorruptFile: The file is not readable as safetensors.
    """
    if not path.is_file():
        raise LayerDiffuseMissing(
            f"{path} is not there.",
            hint=CommandHint("Get the LayerDiffuse files:", "models pull layerdiffuse"),
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFile(
            f"{path} cannot be read as safetensors ({error}).",
            hint=CommandHint(
                "It is damaged or incomplete. Get it again:", "models pull layerdiffuse"
            ),
        ) from error


def fit(network: nn.Module, weights: dict[str, Tensor], path: Path, kind: str) -> None:
    """Load the weights of a file into a network on the meta device, and freeze it.

    `kind` names the network in the message of `ModelUnusable`.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != shapes:
        raise ModelUnusable(
            f"{path.name} is not {kind}: it holds {_describe(shapes, expected)}.",
            hint=CommandHint("Put the right file under this name:", "models pull layerdiffuse"),
        )
    network.load_state_dict(weights, assign=True)
    network.requires_grad_(False).eval()


KINDS = (
    ("::lora::", "a LayerDiffuse patch"),
    ("::diff::", "a LayerDiffuse patch"),
    ("model.diffusion_model.", "a Stable Diffusion checkpoint"),
    ("first_stage_model.", "a VAE"),
    ("latent_conv_in.", "a transparent decoder of other sizes"),
    ("blocks.16.", "a transparent encoder"),
    ("quant_conv.", "a VAE"),
    ("time_embedding.", "a UNet"),
    ("lora", "a LoRA"),
)
"""Kind of a file by a part of a tensor's name. The first match counts."""


def _describe(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str:
    kind = next(
        (kind for mark, kind in KINDS if any(mark in name for name in shapes)),
        f"{len(shapes)} unknown tensors",
    )
    names = {*shapes, *expected}
    differing = sorted(name for name in names if shapes.get(name) != expected.get(name))
    first = differing[0]
    return (
        f"{kind} ({len(differing)} tensors differ, first {first}: "
        f"{_by(shapes.get(first))}, not {_by(expected.get(first))})"
    )


def _by(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
