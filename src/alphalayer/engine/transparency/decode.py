"""The transparent decoder of LayerDiffuse: a decoded picture and its latent become colour and alpha.

Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent Transparency" (2024). The network is a UNet without time embedding
that receives the latent on its way down. It is read in eight orientations and the lower median is kept. Knows nothing of
prompts, samplers or files of pictures.
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
    """(B, in_channels, H, W) pixels in [0, 1] and (B, latent_channels, h, w) latents → (B, out_channels, H, W), about [0, 1].

    The defaults are the published network: 104,104,804 parameters. `attention_blocks` counts from the coarse end. The latent, 1x1
    convolved, is added just before down block `latent_block`, so it is 2^latent_block times smaller than the picture.
    H and W are multiples of `multiple_of`.
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
        """One pass; see the class."""
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
        """Raise `InvalidRequest` or `ModelUnusable` where `forward` could not be computed."""
        height, width = pixel.shape[-2:]
        if height % self.multiple_of or width % self.multiple_of:
            raise InvalidRequest(
                f"the transparent decoder cannot read a picture of {width}x{height}.",
                hint=f"Use a width and height that are multiples of {self.multiple_of}.",
            )
        wanted = (
            self.latent_conv_in.in_channels,
            height >> self.latent_block,
            width >> self.latent_block,
        )
        if tuple(latent.shape[1:]) != wanted:
            raise ModelUnusable(
                f"the transparent decoder expects a latent of {_by(wanted)} for a picture of {width}x{height}, "
                f"and the model gives {_by(latent.shape[1:])}.",
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
    """What the decoder is fed: (pixel in [0, 1], latent).

    `vae_sample` (B, 3, H, W) in [-1, 1] is what the VAE gave, `latent_scaled` (B, C, h, w) what the sampler gave. "official", as
    LayerDiffuse was published: float pixels and the VAE's own latent. "forge2", as later Forge does: pixels cut to 8 bit and
    the sampler's latent.
    """
    pixel = (vae_sample.float() / 2 + 0.5).clamp(0, 1)
    if mode == "forge2":
        return (pixel * 255).floor() / 255, latent_scaled
    return pixel, latent_scaled / scaling_factor + shift_factor


@torch.inference_mode()
def decode_transparent(
    decoder: TransparentDecoder, pixel: Tensor, latent: Tensor, passes_at_once: int = 8
) -> Tensor:
    """(1, 3, H, W) pixels in [0, 1] and (1, C, h, w) → (1, 4, H, W), alpha then straight RGB in [0, 1], in the decoder's dtype.

    `passes_at_once` trades memory for speed and changes the result by rounding only. Quarter turns swap the sides, so a picture
    that is not square takes at least two rounds.

    Raises:
        InvalidRequest: a side is not a multiple of `decoder.multiple_of`.
        ModelUnusable: the latent does not have the shape that the decoder was made for.
    """
    decoder.check_sizes(pixel, latent)
    weight = decoder.conv_in.weight
    pixel, latent = (each.to(weight.device, weight.dtype) for each in (pixel, latent))
    results: list[Tensor] = []
    for round_ in _rounds(pixel.shape[-2] == pixel.shape[-1], passes_at_once):
        outputs = decoder(
            torch.cat([_turn(pixel, *way) for way in round_]),
            torch.cat([_turn(latent, *way) for way in round_]),
        )
        results += [
            _turn_back(each[None].clamp(0, 1), *way)
            for each, way in zip(outputs, round_, strict=True)
        ]
    # torch's median of an even count is the lower of the middle two, as in the published decoder
    return torch.stack(results).median(dim=0).values.clamp(0, 1)


def _rounds(square: bool, at_once: int) -> Iterator[Sequence[tuple[bool, int]]]:
    """The orientations, cut into batches of equal shape."""
    upright, lying = (tuple(way for way in ORIENTATIONS if way[1] % 2 == odd) for odd in (0, 1))
    for group in [upright + lying] if square else [upright, lying]:
        for start in range(0, len(group), max(1, at_once)):
            yield group[start : start + max(1, at_once)]


def _turn(picture: Tensor, flip: bool, turns: int) -> Tensor:
    return torch.rot90(picture.flip(-1) if flip else picture, turns, (-2, -1))


def _turn_back(picture: Tensor, flip: bool, turns: int) -> Tensor:
    back = torch.rot90(picture, -turns, (-2, -1))
    return back.flip(-1) if flip else back


def to_uint8(decoded: Tensor) -> RgbaImage:
    """(1, 4, H, W), alpha then RGB in [0, 1] → RGBA (H, W, 4).

    Multiplied by 255 in the tensor's own dtype and truncated, as the published decoder does: with float16 that changes some
    values by one.
    """
    scaled = (decoded[0] * 255).float().clamp(0, 255).to(torch.uint8)
    return scaled[[1, 2, 3, 0]].permute(1, 2, 0).contiguous().cpu().numpy()


def opaque(rgb: Tensor) -> RgbaImage:
    """VAE picture (1, 3, H, W) in [-1, 1] → RGBA without transparency; 8 bit by truncation."""
    picture = (
        ((rgb[0].float() + 1) / 2)
        .clamp(0, 1)
        .mul(255)
        .to(torch.uint8)
        .permute(1, 2, 0)
        .cpu()
        .numpy()
    )
    return np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1)


def load_decoder(
    path: Path,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TransparentDecoder:
    """Read a decoder from a safetensors file, float16 or float32, frozen and ready for `decode_transparent`.

    `config` holds the arguments of `TransparentDecoder`; what it leaves out is taken from the shapes in the file, else as published.

    Raises:
        LayerDiffuseMissing: there is no such file.
        CorruptFile: it cannot be read as safetensors.
        ModelUnusable: it holds something else, or sizes that the config does not describe.
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
            f"the decoder's config beside {path} does not describe a transparent decoder ({error}).",
            hint="Its keys are the sizes of the network: block_out_channels, latent_channels and so on.",
        ) from error
    fit(decoder, weights, path, "the transparent decoder")
    return decoder.to(device, dtype)


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The widths, depths and latent channels that a decoder's tensors show; nothing if they are not a decoder's."""
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
    """All tensors of a safetensors file, on the CPU. Raises `LayerDiffuseMissing` or `CorruptFile`."""
    if not path.is_file():
        raise LayerDiffuseMissing(
            f"{path} is not there.",
            hint=CommandHint("Get the LayerDiffuse files:", "models pull layerdiffuse"),
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFile(
            f"{path} cannot be read as safetensors ({error}).",
            hint=CommandHint(
                "It is damaged or incomplete. Get it again:", "models pull layerdiffuse"
            ),
        ) from error


def fit(network: nn.Module, weights: dict[str, Tensor], path: Path, what: str) -> None:
    """Give `network` (on the meta device) the weights of a file, all or nothing, frozen; `what` is for the message."""
    wanted = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    found = {name: tuple(each.shape) for name, each in weights.items()}
    if wanted != found:
        raise ModelUnusable(
            f"{path.name} is not {what}: it holds {_describe(found, wanted)}.",
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
"""What a part of a tensor's name gives away, the first that is found counts."""


def _describe(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    kind = next(
        (kind for mark, kind in KINDS if any(mark in name for name in found)),
        f"{len(found)} unknown tensors",
    )
    differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    first = differing[0]
    return f"{kind} ({len(differing)} tensors differ, first {first}: {_by(found.get(first))}, not {_by(wanted.get(first))})"


def _by(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
