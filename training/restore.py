"""Turn the shipped model back into checkpoints, so that training can go on without a cache.

Needs a shipped model that `export` wrote with the present shapes, and the offset encoder of
`training/unfinished`, which the shipped folder lacks because generating does not need it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from training import autoencoder, patch, text, unet
from training.alphalayer_imports import MODEL_FOLDER
from training.autoencoder import LatentTransparency, WeightAverage, copy_weights, load_unfinished
from training.data import CACHE
from training.export import stretch


def restore_texts() -> None:
    """Restore tokenizers and text encoders. The heads that only distillation uses are new."""
    for name in ("tokenizer", "tokenizer_2"):
        target = text.TOKENIZER.parent / name
        shutil.copytree(MODEL_FOLDER / name, target, dirs_exist_ok=True)
    student = text.Student(len(text.CLIPTokenizer.from_pretrained(text.TOKENIZER)))
    student.first.load_state_dict(read("text_encoder/model.safetensors"))
    student.second.load_state_dict(read("text_encoder_2/model.safetensors"))
    torch.save(student.state_dict(), text.CHECKPOINT)


def restore_unet() -> None:
    """Restore the transparent UNet, which is base + patch, and the low-rank way to the base."""
    weights = read("unet/diffusion_pytorch_model.safetensors")
    factors = read("layerdiffuse/patch.safetensors")
    changes: dict[str, dict[str, Tensor]] = {}
    for key, value in factors.items():
        if not key.endswith(".lora_B.weight"):
            continue
        name = key.removeprefix("unet.").removesuffix(".lora_B.weight")
        up, down = value.flatten(1), factors[key.replace(".lora_B.", ".lora_A.")].flatten(1)
        changes[name] = {"up": -up, "down": down}
        weights[f"{name}.weight"] += (up @ down).view_as(weights[f"{name}.weight"])
    network = unet.make_unet()
    network.load_state_dict(weights)
    unet.save(network, unet.make_optimizer(network, 0.0), unet.Average(network), 0)
    torch.save(changes, patch.CHECKPOINT)
    config = json.loads((MODEL_FOLDER / "vae" / "config.json").read_text())
    unet.SCALE.write_text(repr(config["scaling_factor"]))


def restore_autoencoder() -> None:
    """Restore the VAE and the transparent decoder, with the offset encoder of this folder."""
    model = LatentTransparency()
    load_unfinished(model)
    model.vae.load_state_dict(read("vae/diffusion_pytorch_model.safetensors"))
    copy_weights(read("layerdiffuse/decoder.safetensors"), model.decoder.network)
    stretch(model.decoder.network.conv_out, back=True)
    optimizer = autoencoder.make_optimizer(model, 1e-3)
    autoencoder.save(model, optimizer, WeightAverage(model), 0)


def read(file: str) -> dict[str, Tensor]:
    """Load a file of the shipped folder in float32."""
    weights = load_file(Path(MODEL_FOLDER) / file)
    return {name: value.float() for name, value in weights.items()}


if __name__ == "__main__":
    CACHE.mkdir(parents=True, exist_ok=True)
    restore_texts()
    restore_unet()
    restore_autoencoder()
