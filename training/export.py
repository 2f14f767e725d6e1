"""Writes the trained parts as a diffusers folder of the SDXL class with its `layerdiffuse/` folder, float16, into the package."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.autoencoder import DECODER_CONFIG, load_trained
from training.patch import CHECKPOINT as PATCH
from training.patch import averaged_unet
from training.text import TOKENIZER, Encoders
from training.unet import SIDE, scaling_factor, schedule

TARGET = Path(__file__).parents[1] / "src" / "alphalayer" / "models" / "alphalayer-mini"
CARD = Path(__file__).parent / "card"
DEFAULTS = {
    "width": SIDE,
    "height": SIDE,
    "steps": 20,
    "sampler": "DPM++ 2M SDE",
    "scheduler": "Karras",
    "cfg_scale": 3.0,
}
ALPHA_MARGIN = 0.06
"""Alpha this near to 0 or 1 is made 0 or 1: the last layer of the transparent decoder is stretched by it at both ends."""
LARGEST_BYTES = 40_000_000
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderDC"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDPMScheduler"),
}


def export(target: Path) -> int:
    """Write the folder anew, with the card and the notices; its size in bytes."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(CARD, target)
    encoders, autoencoder, unet = Encoders(), load_trained(), averaged_unet()
    changes = torch.load(PATCH, weights_only=True) if PATCH.is_file() else {}
    weights = dict(unet.named_parameters())
    patch = {}
    for name, change in changes.items():
        weight = weights[f"{name}.weight"]
        weight += (change["up"] @ change["down"]).view_as(weight)
        patch[f"unet.{name}.lora_A.weight"] = _as_layer(change["down"], weight.shape[1:]).half()
        patch[f"unet.{name}.lora_B.weight"] = _as_layer(
            -change["up"], (change["up"].shape[1], *(1,) * (weight.dim() - 2))
        ).half()
    autoencoder.vae.register_to_config(scaling_factor=scaling_factor())
    for name, module in (
        ("unet", unet),
        ("vae", autoencoder.vae),
        ("text_encoder", encoders.student.first),
        ("text_encoder_2", encoders.student.second),
    ):
        module.half().save_pretrained(target / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TOKENIZER.parent / name, target / name)
    schedule().save_pretrained(target / "scheduler")
    stretch(autoencoder.decoder.conv_out)
    layers = target / "layerdiffuse"
    layers.mkdir()
    save_file(patch, layers / "patch.safetensors")
    save_file(
        {name: each.half().contiguous() for name, each in autoencoder.decoder.state_dict().items()},
        layers / "decoder.safetensors",
    )
    config = {
        "version": 1,
        "patch": "patch.safetensors",
        "decoder": "decoder.safetensors",
        "decoder_config": DECODER_CONFIG,
        "latent": "unscaled",
        "defaults": DEFAULTS,
    }
    (layers / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    index = {"_class_name": "StableDiffusionXLPipeline", **{name: list(each) for name, each in PARTS.items()}}
    (target / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


@torch.no_grad()
def stretch(last: torch.nn.Conv2d, *, back: bool = False) -> None:
    """Widen the range of the first channel, alpha, from [0, 1] by the margin at both ends, or narrow it again; outputs are clamped."""
    assert last.bias is not None
    scale, shift = 1 + 2 * ALPHA_MARGIN, -ALPHA_MARGIN
    if back:
        scale, shift = 1 / scale, -shift / scale
    last.weight[0] *= scale
    last.bias[0] = last.bias[0] * scale + shift


def _as_layer(matrix: torch.Tensor, inner: tuple[int, ...]) -> torch.Tensor:
    """A factor in the shape of its layer: convolutions keep their kernel in the first factor, 1x1 in the second."""
    return matrix.reshape(matrix.shape[0], *inner).contiguous()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=TARGET)
    size = export(parser.parse_args().target)
    print(f"{size / 1e6:.1f} MB")
    assert size <= LARGEST_BYTES, "the embedded model is to stay below 40 MB"
