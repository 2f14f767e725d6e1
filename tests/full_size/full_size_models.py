"""A full-size SDXL checkpoint and LayerDiffuse files of random numbers.

Names, shapes and number formats are those of the published files. The files are written piece by
piece, so that it takes little memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alphalayer.core.modes import DECODER_FILES, MODES
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.networks.transparent import TransparentDecoder
from alphalayer.engine.networks.weights import NamedWeights
from tests.support import tiny_models

Shapes = dict[str, tuple[int, ...]]
TILE = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float16)
RANK = 256


def checkpoint_shapes(configs: Path = SHIPPED) -> Shapes:
    """Return every tensor of a checkpoint of SDXL's structure in the LDM layout.

    Args:
        configs: Folder with the configs of the parts. The shipped ones, those of SDXL base, give
            3,468,837,867 numbers.
    """
    with torch.device("meta"):
        unet, vae = (
            UNet2DConditionModel.from_config(_config(configs, "unet")),
            AutoencoderKL.from_config(_config(configs, "vae")),
        )
        first = CLIPTextModel(CLIPTextConfig(**_config(configs, "text_encoder")))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**_config(configs, "text_encoder_2")))
    tensors = tiny_models.single_file_tensors(first, second, unet, vae)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def sd15_shapes() -> Shapes:
    """Return every tensor of an SD 1.5 checkpoint in the LDM layout, without position ids."""
    with torch.device("meta"):
        # the defaults of diffusers are the sizes of SD 1.5, but for the width of the text
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL.from_config(_config(SHIPPED, "vae"))
        text = CLIPTextModel(CLIPTextConfig(**_config(SHIPPED, "text_encoder")))
    tensors = tiny_models.sd15_file_tensors(text, unet, vae)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def sharing_shapes(mode: str) -> Shapes:
    """Return the tensors of the file of a mode that shares attention."""
    info, control = MODES[mode], (32, 32, 64, 64, 128, 128, 256, 256)
    return tiny_models.sharing_shapes(
        (320, 640, 1280, 1280), 768, len(info.layers), RANK, control if info.needs else ()
    )


def patch_shapes(configs: Path = SHIPPED) -> Shapes:
    """Return the tensors of the attention patch, in the published key scheme.

    It has q, k, v and out of all transformer blocks, with rank 256.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_config(configs, "unet"))
    shapes: Shapes = {}
    for name, weight in unet.named_parameters():
        if any(f".{part}.weight" in name for part in ("to_q", "to_k", "to_v", "to_out.0")):
            key = "diffusion_model." + tiny_models.unet_name_in_ldm(name)
            shapes |= {
                f"{key}::lora::0": (weight.shape[0], RANK),
                f"{key}::lora::1": (RANK, weight.shape[1]),
            }
    return shapes


def decoder_shapes(**sizes: Any) -> Shapes:
    """Return the tensors of a transparent decoder, by default the published one."""
    with torch.device("meta"):
        return NamedWeights(TransparentDecoder(**sizes)).shapes()


def write_random(path: Path, shapes: Shapes, scale: float = 1.0) -> None:
    """Write a float16 safetensors file with small random numbers in these shapes."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "F16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in _blocks(shapes, scale):
            file.write(block)


def _blocks(shapes: Shapes, scale: float) -> Iterator[bytes]:
    tile = (TILE * np.float16(scale)).tobytes()
    for shape in shapes.values():
        remaining = 2 * int(np.prod(shape))
        while remaining > 0:
            yield tile[: min(remaining, len(tile))]
            remaining -= len(tile)


def write_models(models_dir: Path, configs: Path = SHIPPED, **decoder: Any) -> Path:
    """Write a checkpoint, a patch and a decoder; with the default sizes about 7.9 GB.

    Args:
        models_dir: Models folder to write to.
        configs: Folder with the configs of the checkpoint's parts.
        decoder: Sizes of the transparent decoder that differ from the published ones.

    Returns:
        The path of the checkpoint.
    """
    checkpoint = models_dir / "Stable-diffusion" / "random-sdxl.safetensors"
    write_random(checkpoint, checkpoint_shapes(configs))
    layers = models_dir / "layer_model"
    write_random(layers / "layer_xl_transparent_attn.safetensors", patch_shapes(configs), 0.1)
    write_random(layers / "vae_transparent_decoder.safetensors", decoder_shapes(**decoder))
    return checkpoint


def write_sd15_models(models_dir: Path) -> None:
    """Write a checkpoint of SD 1.5, its decoder and all files of attention sharing, 4 GB."""
    write_random(models_dir / "Stable-diffusion" / "random-sd15.safetensors", sd15_shapes())
    layers = models_dir / "layer_model"
    write_random(layers / DECODER_FILES["sd15"][0], decoder_shapes())
    for mode in MODES.values():
        if mode.shares_attention:
            write_random(layers / mode.files[0], sharing_shapes(mode.name), 0.1)


def _config(configs: Path, part: str) -> dict[str, Any]:
    return json.loads((configs / part / "config.json").read_text())
