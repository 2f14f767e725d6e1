"""Reference renderer from prompt to RGBA, independent of `alphalayer`.

It uses torch, torchsde, transformers and the modules of diffusers. It follows the published
formulas step by step, so that a test can compare the engine with it.

- Model: a diffusers folder of the SDXL class with `layerdiffuse/`. The patch is a LoRA with PEFT
  names, the decoder has the published architecture.
- Prompt: one prompt of at most 75 tokens without weights, for one image.
- Sampling: `cpu` noise, DPM++ 2M SDE, Karras schedule, float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn import functional
from torchsde import BrownianTree
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@torch.no_grad()
def render(
    folder: Path,
    prompt: str,
    negative_prompt: str,
    *,
    seed: int,
    steps: int,
    cfg_scale: float,
    width: int,
    height: int,
    decode: str,
) -> np.ndarray:
    """Return the image, uint8 (height, width, 4), straight alpha."""

    # text: both encoders, last but one hidden state without the final norm; pooled from the second
    def encode(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        if text == "":
            (c, p), zero = encode("x"), 0.0
            return c * zero, p * zero
        hidden, pooled = [], None
        for tokens, model, kind in (
            ("tokenizer", "text_encoder", CLIPTextModel),
            ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
        ):
            tokenizer = CLIPTokenizer.from_pretrained(folder / tokens, local_files_only=True)
            encoder = (
                kind.from_pretrained(folder / model, local_files_only=True).half().float().eval()
            )
            ids = tokenizer(
                text, padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        return torch.cat(hidden, dim=-1), pooled

    (cond, cond_pooled), (uncond, uncond_pooled) = encode(prompt), encode(negative_prompt)
    context, pooled = torch.cat([uncond, cond]), torch.cat([uncond_pooled, cond_pooled])

    # schedule: scaled-linear betas, Karras between the model's own ends
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    betas = (
        np.linspace(
            config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]
        )
        ** 2
    )
    alpha_bar = np.cumprod(1 - betas)
    table = torch.from_numpy(np.sqrt((1 - alpha_bar) / alpha_bar)).float()
    low, high = float(table[0]) ** (1 / 7), float(table[-1]) ** (1 / 7)
    sigmas = torch.cat([(high + torch.linspace(0, 1, steps) * (low - high)) ** 7, torch.zeros(1)])

    # the UNet with the patch merged into its weights
    unet = (
        UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).float().eval()
    )
    layer_config = json.loads((folder / "layerdiffuse/config.json").read_text())
    merge_patch(unet, load_file(folder / "layerdiffuse" / layer_config["patch"]))

    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).float().eval()
    down = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (1, vae.config.latent_channels, height // down, width // down)
    x = torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed))[None] * sigmas[0]
    tree = BrownianTree(float(sigmas[-2]), torch.zeros(shape[1:]), float(sigmas[0]), entropy=seed)

    size_ids = torch.tensor([[height, width, 0, 0, height, width]] * 2, dtype=torch.float32)
    previous, previous_h = None, None
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        timestep = (table.log() - sigma.log()).abs().argmin().float()
        output = unet(
            (x / (sigma**2 + 1).sqrt()).repeat(2, 1, 1, 1),
            timestep,
            encoder_hidden_states=context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": size_ids},
        ).sample
        clean_uncond, clean_cond = (x - output * sigma).chunk(2)
        clean = clean_uncond + cfg_scale * (clean_cond - clean_uncond)
        if following == 0:
            x = clean
            break
        h = math.log(sigma / following)
        x_next = following / sigma * math.exp(-h) * x - math.expm1(-2 * h) * clean
        if previous is not None:
            x_next = x_next - 0.5 * math.expm1(-2 * h) * (h / previous_h) * (clean - previous)
        noise = tree(float(following), float(sigma))[None] / math.sqrt(
            float(sigma) - float(following)
        )
        x = x_next - noise * following * math.sqrt(-math.expm1(-2 * h))
        previous, previous_h = clean, h

    # decode: VAE image and latent through the decoder in eight orientations, lower median
    latent = x / vae.config.scaling_factor
    pixel = (vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
    if decode == "forge2":
        pixel, latent = (pixel * 255).to(torch.uint8).float() / 255, x
    weights = load_file(folder / "layerdiffuse" / layer_config["decoder"])
    weights = {name: weight.float() for name, weight in weights.items()}
    passes = []
    for flip in (False, True):
        for turns in range(4):

            def turn(t, flip=flip, turns=turns):
                return torch.rot90(t.flip(3) if flip else t, turns, (2, 3))

            y = decoder(weights, layer_config["decoder_config"], turn(pixel), turn(latent)).clamp(
                0, 1
            )
            y = torch.rot90(y, -turns, (2, 3))
            passes.append(y.flip(3) if flip else y)
    y = torch.stack(passes).sort(dim=0).values[3][0].clamp(0, 1)
    return (y[[1, 2, 3, 0]] * 255).to(torch.uint8).permute(1, 2, 0).numpy()


def merge_patch(unet: torch.nn.Module, patch: dict[str, torch.Tensor]) -> None:
    """Add up @ down (or the full offset) to the weights that a patch names."""
    weights = unet.state_dict()
    for key, up in patch.items():
        if key.endswith(".lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            weights[stem.removeprefix("unet.") + ".weight"] += (
                up.float() @ patch[stem + ".lora_A.weight"].float()
            )
        elif not key.endswith(".lora_A.weight"):
            raise AssertionError(f"the reference does not know the key {key}")


def decoder(
    w: dict[str, torch.Tensor], config: dict, pixel: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """Run the transparent decoder as plain functions of its weights.

    Args:
        w: Weights by name, float32.
        config: Configuration of the decoder.
        pixel: float32 (1, 3, H, W).
        latent: float32 (1, C, h, w).

    Returns:
        float32 (1, 4, H, W).
    """
    groups, head_dim = config["norm_num_groups"], config["attention_head_dim"]
    blocks, attention_blocks = len(config["block_out_channels"]), config["attention_blocks"]

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = w[name + ".weight"]
        return functional.conv2d(
            x, weight, w[name + ".bias"], stride=stride, padding=weight.shape[-1] // 2
        )

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.group_norm(x, groups, w[name + ".weight"], w[name + ".bias"], eps)

    def resnet(name: str, x: torch.Tensor) -> torch.Tensor:
        h = conv(name + ".conv1", functional.silu(norm(name + ".norm1", x, 1e-5)))
        h = conv(name + ".conv2", functional.silu(norm(name + ".norm2", h, 1e-5)))
        return h + (conv(name + ".conv_shortcut", x) if name + ".conv_shortcut.weight" in w else x)

    def attention(name: str, x: torch.Tensor) -> torch.Tensor:
        b, c, height, width = x.shape
        tokens = norm(name + ".group_norm", x, 1e-5).flatten(2).transpose(1, 2)

        def project(key):
            return functional.linear(tokens, w[f"{name}.{key}.weight"], w[f"{name}.{key}.bias"])

        q, k, v = (
            project(key).view(b, -1, c // head_dim, head_dim).transpose(1, 2)
            for key in ("to_q", "to_k", "to_v")
        )
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(head_dim), dim=-1) @ v
        mixed = mixed.transpose(1, 2).reshape(b, -1, c)
        mixed = functional.linear(mixed, w[name + ".to_out.0.weight"], w[name + ".to_out.0.bias"])
        return x + mixed.transpose(1, 2).view(b, c, height, width)

    h = conv("conv_in", pixel)
    skips = [h]
    for i in range(blocks):
        if i == config["latent_block"]:
            h = h + conv("latent_conv_in", latent)
        for j in range(config["layers_per_block"]):
            h = resnet(f"down_blocks.{i}.resnets.{j}", h)
            if i >= blocks - attention_blocks:
                h = attention(f"down_blocks.{i}.attentions.{j}", h)
            skips.append(h)
        if i < blocks - 1:
            h = conv(f"down_blocks.{i}.downsamplers.0.conv", h, stride=2)
            skips.append(h)
    h = resnet(
        "mid_block.resnets.1", attention("mid_block.attentions.0", resnet("mid_block.resnets.0", h))
    )
    for i in range(blocks):
        for j in range(config["layers_per_block"] + 1):
            h = resnet(f"up_blocks.{i}.resnets.{j}", torch.cat([h, skips.pop()], dim=1))
            if i < attention_blocks:
                h = attention(f"up_blocks.{i}.attentions.{j}", h)
        if i < blocks - 1:
            h = conv(
                f"up_blocks.{i}.upsamplers.0.conv",
                functional.interpolate(h, scale_factor=2, mode="nearest"),
            )
    return conv("conv_out", functional.silu(norm("conv_norm_out", h, 1e-5)))
