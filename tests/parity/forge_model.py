"""The small random model that Forge was run with, bit for bit; see `data/forge/README.md`.

The order of the random numbers and every constant matter: a change here is another model.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tests.support.tiny_models import decoder, unet_name_in_ldm
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.networks.transparent import TransparentDecoder, TransparentEncoder
from alphalayer.engine.networks.weights import NamedWeights

SEED = 2024
RANK = 8
_RESIDUAL = re.compile(r"(conv2|to_out\.0|ff\.net\.2|proj_out|out_proj|fc2)\.weight$")
_PROJECTION = re.compile(r"attn[12]\.(to_q|to_k|to_v|to_out\.0)\.weight$")
_NOT_IN_CONV_PATCH = re.compile(r"attn[12]\.(to_q|to_k|to_v)\.weight$|time_embed|label_emb")
_UNET = {
    "block_out_channels": (64, 128, 256),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 64 + 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 128 + 6 * 256,
}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
_TEXT = {"vocab_size": 49408, "eos_token_id": 2}


def make_models(models: Path) -> Path:
    """Write the model as a diffusers folder, its attention patch and a decoder.

    The decoder is not the one that Forge ran with: the latents before it are compared.
    """
    generator = torch.Generator().manual_seed(SEED)
    folder = models / "Stable-diffusion" / "tiny"
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(**_UNET),
            "vae": AutoencoderKL(**_VAE),
            "text_encoder": CLIPTextModel(_text_config(64, 2, 3, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(128, 4, 4, "gelu")),
        }
    states: dict[str, dict[str, Tensor]] = {}
    for part, network in networks.items():
        states[part] = {
            name: _draw(name, tensor.shape, generator).half()
            for name, tensor in network.state_dict().items()
            if "position_ids" not in name
        }
        (folder / part).mkdir(parents=True)
        is_text = part.startswith("text")
        stem = "model" if is_text else "diffusion_pytorch_model"
        save_file(states[part], folder / part / f"{stem}.safetensors")
        network.config.save_pretrained(folder / part) if is_text else network.save_config(
            folder / part
        )
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(SHIPPED / part, folder / part)
    shutil.copy(SHIPPED / "model_index.json", folder)
    layers = models / "layer_model"
    layers.mkdir()
    patch = _attention_patch(states["unet"], generator)
    save_file(patch, layers / "layer_xl_transparent_attn.safetensors")
    save_file(decoder().half().state_dict(), layers / "vae_transparent_decoder.safetensors")
    save_file(_encoder(generator), layers / "vae_transparent_encoder.safetensors")
    return models


def _encoder(generator: torch.Generator) -> dict[str, Tensor]:
    """Return the transparent encoder. Random numbers of the published decoder are skipped."""
    with torch.device("meta"):
        networks = TransparentDecoder(), TransparentEncoder()
    for shape in NamedWeights(networks[0]).shapes().values():
        torch.randn(*shape, generator=generator)
    return {
        name: _draw(name, torch.Size(shape), generator).half()
        for name, shape in NamedWeights(networks[1]).shapes().items()
    }


def _text_config(width: int, heads: int, layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        hidden_act=activation,
        projection_dim=width,
        **_TEXT,
    )


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(*shape, generator=generator)
    if "token_embedding" in name:
        return values * 0.5 + 0.05
    if "position" in name:
        return values * 0.2 + 0.1
    if name.endswith("bias"):
        return values * 0.05
    if len(shape) == 1:
        return values * 0.1 + 1
    gain = 0.4 if _RESIDUAL.search(name) else 1.0
    if name == "conv_out.weight":
        gain = 1.2
    if name.endswith("decoder.conv_out.weight"):
        gain = 0.6
    return values * (gain / math.sqrt(math.prod(shape[1:])))


def _attention_patch(unet: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the attention patch. Random numbers of the conv patch are skipped."""
    patch: dict[str, Tensor] = {}
    for name, weight in unet.items():
        key = f"diffusion_model.{unet_name_in_ldm(name)}"
        if _PROJECTION.search(key):
            high, low = weight.shape
            scale = math.sqrt(0.35 / math.sqrt(low * RANK))
            up = torch.randn(high, RANK, generator=generator) * scale
            down = torch.randn(RANK, low, generator=generator) * scale * RANK**0.25
            patch |= {f"{key}::lora::0": up.half(), f"{key}::lora::1": down.half()}
        if not _NOT_IN_CONV_PATCH.search(key):
            torch.randn(*weight.shape, generator=generator)
    return patch
