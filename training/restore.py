"""Takes the shipped model back to checkpoints, so that training can go on on a machine that has none: `python -m training.restore`.

Everything is in the shipped folder but the encoder of the offset, which drawing does not need. It is learnt anew against the shipped
networks, which stay as they are: what it hides, the shipped transparent decoder must find.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from alphalayer.catalog import EMBEDDED_MODEL
from training import autoencoder, patch, text, unet
from training.autoencoder import LATENT_NOISE, Crops, LatentTransparency, evaluate, loss_of
from training.data import CACHE
from training.export import stretch


def restore_texts() -> None:
    """Tokenizers and text encoders; the heads into the teacher's space are gone, and only the text stage uses them."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(EMBEDDED_MODEL / name, text.TOKENIZER.parent / name, dirs_exist_ok=True)
    student = text.Student(len(text.CLIPTokenizer.from_pretrained(text.TOKENIZER)))
    student.first.load_state_dict(read("text_encoder/model.safetensors"))
    student.second.load_state_dict(read("text_encoder_2/model.safetensors"))
    torch.save(student.state_dict(), text.CHECKPOINT)


def restore_unet() -> None:
    """The transparent UNet, which is base + patch, and the way from it to the base, which is the patch turned round."""
    weights = read("unet/diffusion_pytorch_model.safetensors")
    factors = read("layerdiffuse/patch.safetensors")
    changes: dict[str, dict[str, Tensor]] = {}
    for key, up in factors.items():
        if not key.endswith(".lora_B.weight"):
            continue
        name = key.removeprefix("unet.").removesuffix(".lora_B.weight")
        down = factors[key.replace(".lora_B.", ".lora_A.")].flatten(1)
        changes[name] = {"up": -up.flatten(1), "down": down}
        weights[f"{name}.weight"] += (up.flatten(1) @ down).view_as(weights[f"{name}.weight"])
    network = unet.make_unet()
    network.load_state_dict(weights)
    fresh = unet.make_optimizer(network, 0.0)
    unet.save(network, fresh, unet.Average(network), 0)
    torch.save(changes, patch.CHECKPOINT)
    unet.SCALE.write_text(repr(json.loads((EMBEDDED_MODEL / "vae" / "config.json").read_text())["scaling_factor"]))


def restore_autoencoder(steps: int, learning_rate: float = 1e-3) -> None:
    """The VAE and the transparent decoder as they are, and an encoder of the offset that fits them, learnt in so many steps."""
    torch.manual_seed(0)
    model = LatentTransparency().to(memory_format=torch.channels_last)
    model.vae.load_state_dict(read("vae/diffusion_pytorch_model.safetensors"))
    model.decoder.load_state_dict(read("layerdiffuse/decoder.safetensors"))
    stretch(model.decoder.conv_out, back=True)
    model.vae.requires_grad_(False)
    model.decoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.offset.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    crops, start = Crops(300_000), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            )
        rgba = (crops.whole(2) if step % 3 == 2 else crops.batch(4, 128)).contiguous(memory_format=torch.channels_last)
        loss, spread = loss_of(model, rgba, LATENT_NOISE, crops.torch_rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"{step + 1} {time.time() - start:.0f} s loss {loss.item():.3f} spread {spread:.2f}", flush=True)
    # as if trained to its end: the autoencoder's stage has nothing left to do
    everything = torch.optim.AdamW(model.requires_grad_(True).parameters(), learning_rate)
    autoencoder.save(model, everything, autoencoder.STEPS)
    print(evaluate(model.eval(), sheet=CACHE / "autoencoder.png"), flush=True)


def read(file: str) -> dict[str, Tensor]:
    """A file of the shipped folder, in float32."""
    return {name: each.float() for name, each in load_file(Path(EMBEDDED_MODEL) / file).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900, help="of the encoder of the offset")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    restore_texts()
    restore_unet()
    restore_autoencoder(options.steps)
