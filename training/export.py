"""Write the trained parts into the package as a diffusers folder of the SDXL class.

The folder has a `layerdiffuse/` folder with the patch and the transparent decoder. All weights
are float16. The transparent encoder is trained for an exported folder (`encoder.py`). It is kept as
long as VAE and transparent decoder stay the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.alphalayer_imports import MODEL_FOLDER, NamedWeights
from training.autoencoder import DECODER_CONFIG, PATCH_SIDE, load_trained
from training.data import FOLDER, SIDE
from training.patch import CHECKPOINT as PATCH
from training.text import TOKENIZER, Encoders
from training.unet import load_averaged, make_schedule, scaling_factor

CARD = FOLDER / "card"
DEFAULTS = {
    "width": SIDE,
    "height": SIDE,
    "steps": 10,
    "sampler": "DPM++ 2M",
    "scheduler": "Karras",
    "cfg_scale": 3.0,
}
PASSES = 1
"""Orientations in which the transparent decoder reads a latent. The published decoder needs 8."""
ALPHA_MARGIN = 0.06
"""Alpha this near to 0 or 1 becomes 0 or 1. The last layer's range is widened by it."""
DECODER_FILE = Path("layerdiffuse", "decoder.safetensors")
LARGEST_BYTES = 60_000_000
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
    """Write the folder from the start, with the card and the notices.

    Returns:
        Its size in bytes.
    """
    layers = target / "layerdiffuse"
    kept = layers / "encoder.safetensors"
    encoder = kept.read_bytes() if kept.is_file() else b""
    earlier = autoencoder_bytes(target)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(CARD, target)
    encoders, autoencoder, unet = Encoders(), load_trained(), load_averaged()
    changes = torch.load(PATCH, weights_only=True) if PATCH.is_file() else {}
    weights = dict(unet.named_parameters())
    patch: dict[str, torch.Tensor] = {}
    for name, change in changes.items():
        weight = weights[f"{name}.weight"]
        weight += (change["up"] @ change["down"]).view_as(weight)
        down = _as_layer(change["down"], weight.shape[1:])
        inner = (change["up"].shape[1], *(1,) * (weight.dim() - 2))
        patch[f"unet.{name}.lora_A.weight"] = down.half()
        patch[f"unet.{name}.lora_B.weight"] = _as_layer(-change["up"], inner).half()
    autoencoder.vae.register_to_config(scaling_factor=scaling_factor())
    modules = {
        "unet": unet,
        "vae": autoencoder.vae,
        "text_encoder": encoders.student.first,
        "text_encoder_2": encoders.student.second,
    }
    for name, module in modules.items():
        module.half().save_pretrained(target / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TOKENIZER.parent / name, target / name)
    make_schedule().save_pretrained(target / "scheduler")
    decoder = autoencoder.decoder.network
    stretch(decoder.conv_out)
    layers.mkdir()
    save_file(patch, layers / "patch.safetensors")
    decoder_weights = {
        name: value.half().contiguous() for name, value in NamedWeights(decoder).items()
    }
    save_file(decoder_weights, target / DECODER_FILE)
    config = {
        "version": 1,
        "patch": "patch.safetensors",
        "decoder": "decoder.safetensors",
        "decoder_config": {**DECODER_CONFIG, "patch_size": PATCH_SIDE, "residual": True},
        "passes": PASSES,
        "latent": "unscaled",
        "defaults": DEFAULTS,
    }
    # The transparent encoder belongs to the networks that decode its latents.
    if encoder and autoencoder_bytes(target) == earlier:
        kept.write_bytes(encoder)
        config["encoder"] = kept.name
    (layers / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    index: dict[str, object] = {"_class_name": "StableDiffusionXLPipeline"}
    index |= {name: list(classes) for name, classes in PARTS.items()}
    (target / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def autoencoder_bytes(target: Path) -> list[bytes]:
    """Return the files of the VAE and the transparent decoder that a folder has."""
    files = target / "vae" / "diffusion_pytorch_model.safetensors", target / DECODER_FILE
    return [file.read_bytes() for file in files if file.is_file()]


@torch.no_grad()
def stretch(last: torch.nn.Conv2d, *, back: bool = False) -> None:
    """Widen the range of alpha from [0, 1] by the margin at both ends, or narrow it again.

    Args:
        last: Last layer of the patch decoder. Its first 16 channels are the alpha of a square,
            0.5 below its value.
        back: Whether to undo the change.
    """
    assert last.bias is not None
    scale = 1 / (1 + 2 * ALPHA_MARGIN) if back else 1 + 2 * ALPHA_MARGIN
    area = PATCH_SIDE**2
    # Alpha is the output plus 0.5, so a factor alone widens both ends.
    last.weight[:area] *= scale
    last.bias[:area] *= scale


def _as_layer(matrix: torch.Tensor, inner: tuple[int, ...]) -> torch.Tensor:
    """Return a factor in its layer's shape. Convolutions keep their kernel in the first factor."""
    return matrix.reshape(matrix.shape[0], *inner).contiguous()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=MODEL_FOLDER)
    size = export(parser.parse_args().target)
    print(f"{size / 1e6:.1f} MB")
    assert size <= LARGEST_BYTES, "the embedded model must stay below 60 MB"
