"""Random tiny models of SDXL's and SD 1.5's shape: folders, single files, LayerDiffuse files.

The same seed gives the same weights in every form, so that tests can compare the forms.
Each process builds a model once, because random weights take longer than copies of them.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, wraps
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alphalayer.core.modes import ENCODER_FILES, MODES
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.networks.transparent import TransparentEncoder
from tests.support.reference_decoder import ReferenceDecoder
from tests.support.seeded_weights import seeded_weights

TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "num_hidden_layers": 3,
    "eos_token_id": 2,
}
WIDTH_L, WIDTH_G = 32, 64
"""Widths of the text encoders. That of SD 1.5 has the first."""
DECODER = {
    "in_channels": 3,
    "out_channels": 4,
    "latent_channels": 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 2,
    "attention_blocks": 1,
    "latent_block": 3,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
ENCODER = (8, 8, 8, 8, 8, 8, 8, 8, 4)
"""Widths of the transparent encoder."""
RANK = 4
Model = TypeVar("Model")


def _built_once(build: Callable[[int], Model]) -> Callable[..., Model]:
    """Return a function that builds the model of a seed once, and returns copies of it."""
    built = cache(build)

    @wraps(build)
    def copy(seed: int = 0) -> Model:
        return deepcopy(built(seed))

    return copy


@_built_once
def text_encoders(seed: int = 0) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Return both encoders, each with one head, which loaders infer from the width."""
    torch.manual_seed(seed)
    first = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH_L,
            intermediate_size=64,
            num_attention_heads=1,
            hidden_act="quick_gelu",
            projection_dim=WIDTH_L,
            **TEXT,
        )
    )
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=WIDTH_G,
            intermediate_size=128,
            num_attention_heads=1,
            hidden_act="gelu",
            projection_dim=WIDTH_G,
            **TEXT,
        )
    )
    return _rounded(first), _rounded(second)


@_built_once
def unet(seed: int = 0) -> UNet2DConditionModel:
    """Return a UNet with SDXL's block structure and 32, 64 and 64 channels."""
    torch.manual_seed(seed + 1)
    return _rounded(
        UNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 1, 1),
            cross_attention_dim=WIDTH_L + WIDTH_G,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH_G + 6 * 8,
            sample_size=8,
        )
    )


@_built_once
def sd15_unet(seed: int = 0) -> UNet2DConditionModel:
    """Return a UNet with SD 1.5's block structure and 32, 64, 64 and 64 channels."""
    torch.manual_seed(seed + 1)
    return _rounded(
        UNet2DConditionModel(
            block_out_channels=(32, 64, 64, 64),
            cross_attention_dim=WIDTH_L,
            attention_head_dim=8,
            sample_size=8,
        )
    )


@_built_once
def vae(seed: int = 0) -> AutoencoderKL:
    """Return a VAE with four levels, so that a latent cell is 8 pixels."""
    torch.manual_seed(seed + 2)
    return _rounded(
        AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
            sample_size=64,
        )
    )


@_built_once
def decoder(seed: int = 0) -> ReferenceDecoder:
    """Return a transparent decoder whose weights are large enough for a varied image."""
    torch.manual_seed(seed + 3)
    network = _rounded(ReferenceDecoder(**DECODER))
    with torch.no_grad():
        network.conv_out.weight.mul_(1.2)
        network.conv_out.bias.add_(0.5)
    return _rounded(network)


def lora_pairs(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (up, down) by parameter name for every attention projection of the UNet."""
    generator = torch.Generator().manual_seed(seed + 4)
    pairs = {}
    for name, weight in unet(seed).named_parameters():
        if any(f".{part}.weight" in name for part in ("to_q", "to_k", "to_v", "to_out.0")):
            up = torch.randn(weight.shape[0], RANK, generator=generator) * 0.2
            down = torch.randn(RANK, weight.shape[1], generator=generator) * 0.2
            pairs[name] = (up.half(), down.half())
    return pairs


def make_diffusers_folder(path: Path, seed: int = 0) -> Path:
    """Write a diffusers folder with `layerdiffuse/`, whose patch has PEFT names."""
    return shutil.copytree(_diffusers_folder(seed), path)


def make_sd15_folder(path: Path, seed: int = 0) -> Path:
    """Write a diffusers folder of SD 1.5's class, without LayerDiffuse files."""
    first, _ = text_encoders(seed)
    first.save_pretrained(path / "text_encoder")
    sd15_unet(seed).save_pretrained(path / "unet")
    own = vae(seed)
    own.register_to_config(scaling_factor=0.18215)
    own.save_pretrained(path / "vae")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(SHIPPED / part, path / part)
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return path


def make_sd15_file(path: Path, seed: int = 0) -> Path:
    """Write the same model as an LDM single file, with the names of old files."""
    tensors = {
        name.replace(".text_model.", "."): tensor
        for name, tensor in sd15_file_tensors(
            text_encoders(seed)[0], sd15_unet(seed), vae(seed)
        ).items()
    }
    tensors["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77.0)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path)
    return path


def sd15_file_tensors(
    text: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL
) -> dict[str, torch.Tensor]:
    """Return the tensors of an SD 1.5 model under the names of an LDM single file."""
    tensors = {
        f"model.diffusion_model.{unet_name_in_ldm(name)}": tensor
        for name, tensor in unet.state_dict().items()
    }
    # the first level on the way up has no attention, so its upsampler is the second part
    tensors = {
        name.replace("output_blocks.2.2.", "output_blocks.2.1."): tensor
        for name, tensor in tensors.items()
    }
    tensors |= _vae_in_ldm(vae.state_dict())
    return tensors | {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in text.state_dict().items()
    }


@cache
def _diffusers_folder(seed: int) -> Path:
    path = Path(tempfile.mkdtemp(prefix="alphalayer-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    first, second = text_encoders(seed)
    first.save_pretrained(path / "text_encoder")
    second.save_pretrained(path / "text_encoder_2")
    unet(seed).save_pretrained(path / "unet")
    vae(seed).save_pretrained(path / "vae")
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(SHIPPED / part, path / part)
    shutil.copy(SHIPPED / "model_index.json", path)
    patch = {}
    for name, (up, down) in lora_pairs(seed).items():
        stem = "unet." + name.removesuffix(".weight")
        patch |= {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}
    own = path / "layerdiffuse"
    own.mkdir()
    save_file(patch, own / "patch.safetensors")
    save_file(decoder(seed).half().state_dict(), own / "decoder.safetensors")
    defaults = {"width": 64, "height": 64, "steps": 4}
    config = {
        "version": 1,
        "patch": "patch.safetensors",
        "decoder": "decoder.safetensors",
        "decoder_config": DECODER,
        "defaults": defaults,
    }
    (own / "config.json").write_text(json.dumps(config))
    return path


def make_shared_models(models: Path) -> Path:
    """Write a model without patches of its own, and `layer_model/`; return that folder.

    A folder loads several times as fast as a single file.
    """
    folder = make_diffusers_folder(models / "Stable-diffusion" / "tiny")
    shutil.rmtree(folder / "layerdiffuse")
    return make_layer_files(models / "layer_model")


def make_single_file(path: Path, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Write the same model as an LDM single file."""
    tensors = single_file_tensors(*text_encoders(seed), unet(seed), vae(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def single_file_tensors(
    first: CLIPTextModel,
    second: CLIPTextModelWithProjection,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names of an LDM single file."""
    tensors = {
        f"model.diffusion_model.{unet_name_in_ldm(name)}": tensor
        for name, tensor in unet.state_dict().items()
    }
    tensors |= _vae_in_ldm(vae.state_dict())
    prefix = "conditioner.embedders.0.transformer."
    for name, tensor in first.state_dict().items():
        tensors[prefix + ("" if name.startswith("text_model.") else "text_model.") + name] = tensor
    return tensors | _open_clip(second.state_dict())


def make_layer_files(folder: Path, seed: int = 0) -> Path:
    """Write the patch, in the published key scheme, and the decoder, both float16."""
    folder.mkdir(parents=True, exist_ok=True)
    patch = {}
    for name, (up, down) in lora_pairs(seed).items():
        key = "diffusion_model." + unet_name_in_ldm(name)
        patch |= {f"{key}::lora::0": up, f"{key}::lora::1": down}
    save_file(patch, folder / "layer_xl_transparent_attn.safetensors")
    save_file(decoder(seed).half().state_dict(), folder / "vae_transparent_decoder.safetensors")
    return folder


def make_encoder(folder: Path, widths: tuple[int, ...] = ENCODER, seed: int = 0) -> Path:
    """Write a transparent encoder, float16."""
    torch.manual_seed(seed + 5)
    encoder = TransparentEncoder(widths).half()
    path = folder / ENCODER_FILES[0]
    save_file(encoder.state_dict(), path)
    return path


def make_inpainting_folder(path: Path, seed: int = 0) -> Path:
    """Write the same model as an inpainting checkpoint, and return its file with the UNet.

    Its first convolution reads five more channels.
    """
    make_diffusers_folder(path, seed)
    shutil.rmtree(path / "layerdiffuse")
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    weight = tensors["conv_in.weight"]
    generator = torch.Generator().manual_seed(seed + 901)
    more = torch.randn(len(weight), 5, 3, 3, generator=generator) * 0.2
    tensors["conv_in.weight"] = torch.cat([weight, more.to(weight.dtype)], dim=1)
    save_file(tensors, file)
    config = path / "unet" / "config.json"
    values = json.loads(config.read_text()) | {"in_channels": 9}
    config.write_text(json.dumps(values))
    return file


def make_condition_patch(folder: Path, mode: str, seed: int = 0) -> Path:
    """Write the patch of a mode with input images.

    It changes `conv_in` and the last normalisation.
    """
    (name, *_), inputs = MODES[mode].files, len(MODES[mode].needs)
    generator = torch.Generator().manual_seed(seed + 900)
    own = unet(seed).state_dict()
    width = len(own["conv_in.weight"])
    changes = {
        "conv_in.weight": torch.randn(width, 4 + 4 * inputs, 3, 3, generator=generator) * 0.2,
        "conv_norm_out.weight": torch.randn(width, generator=generator) * 0.1,
    }
    save_file(
        {
            f"diffusion_model.{unet_name_in_ldm(parameter)}::diff::0": change.half()
            for parameter, change in changes.items()
        },
        folder / name,
    )
    return folder / name


def sharing_shapes(
    widths: Sequence[int], context: int, images: int, rank: int, control: Sequence[int] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file of attention sharing by name.

    Args:
        widths: Widths of the UNet's levels.
        context: Width of the text.
        images: Images of a set.
        rank: Rank of the changes.
        control: Widths of the encoder's first block. Empty: no input image.
    """
    down = [width for width in widths[:3] for _ in range(2)]
    up = [width for width in widths[2::-1] for _ in range(3)]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(width for width in (*down, *up, widths[3]) for _ in range(2)):
        unit = f"hookers.layers.{i}."
        text = context if i % 2 else width
        for part, entering in (("q", width), ("k", text), ("v", text), ("out", width)):
            for image in range(images):
                lora = f"{unit}to_{part}_lora.{image}."
                shapes[f"{lora}down.weight"] = rank, entering
                shapes[f"{lora}up.weight"] = width, rank
        for part in "inqkvo":
            shapes[f"{unit}temporal_{part}.weight"] = (width,) if part == "n" else (width, width)
            shapes[f"{unit}temporal_{part}.bias"] = (width,)
        for image in range(images) if control else ():
            convs, last = f"{unit}control_convs.{image}.", control[-1]
            shapes |= {f"{convs}0.weight": (last, last, 3, 3), f"{convs}0.bias": (last,)}
            shapes |= {f"{convs}2.weight": (width, last, 1, 1), f"{convs}2.bias": (width,)}
    for block, outputs in enumerate([control, *[control[-1:] * 2] * 3]) if control else ():
        entering = control[-1] if block else 3
        for i, width in enumerate(outputs):
            conv = f"kwargs_encoder.blocks_{block}.{2 * i}."
            shapes |= {f"{conv}weight": (width, entering, 3, 3), f"{conv}bias": (width,)}
            entering = width
    return shapes


def make_sharing_file(folder: Path, mode: str, *, is_zero: bool = False) -> Path:
    """Write the file of a mode that shares attention, for the tiny UNet of SD 1.5.

    Args:
        folder: The folder.
        mode: Name of the mode.
        is_zero: Whether the changes are zero, so that the attentions are those of the model.
    """
    info = MODES[mode]
    control = (4, 4, 4, 4, 8, 8, 8, 8) if info.needs else ()
    shapes = sharing_shapes((32, 64, 64, 64), WIDTH_L, len(info.layers), 2, control)
    tensors = {name: tensor.half() for name, tensor in seeded_weights(shapes, 7).items()}
    for name, tensor in tensors.items():
        adds = ".up." in name or "temporal_o" in name or re.search(r"control_convs\..\.2", name)
        if is_zero and adds:
            tensor.zero_()
    path = folder / info.files[0]
    save_file(tensors, path)
    return path


def unet_name_in_ldm(name: str) -> str:
    """Return the LDM name of a diffusers UNet parameter.

    The UNet has two residual blocks a level. Its last levels have attention.
    """
    whole = {
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for old, new in whole.items():
        if name.startswith(old):
            return _resnet_in_ldm(new + name[len(old) :], "resnets" in old)
    side, level, kind, layer, rest = name.split(".", 4)
    first = int(level) * 3 + int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{int(level) * 3 + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{int(level) * 3 + 2}.2.{rest}"
    part = 0 if kind == "resnets" else 1
    block = (
        f"input_blocks.{first + 1}.{part}."
        if side == "down_blocks"
        else f"output_blocks.{first}.{part}."
    )
    return _resnet_in_ldm(block + rest, kind == "resnets")


def _resnet_in_ldm(name: str, is_resnet: bool) -> str:
    renames = {
        ".norm1.": ".in_layers.0.",
        ".conv1.": ".in_layers.2.",
        ".time_emb_proj.": ".emb_layers.1.",
        ".norm2.": ".out_layers.0.",
        ".conv2.": ".out_layers.3.",
        ".conv_shortcut.": ".skip_connection.",
    }
    for old, new in renames.items() if is_resnet else ():
        name = name.replace(old, new)
    return name


def _vae_in_ldm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        new = name.replace("mid_block.resnets.0.", "mid.block_1.").replace(
            "mid_block.resnets.1.", "mid.block_2."
        )
        new = new.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm.", "norm.")
        for part, short in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            new = new.replace(f".{part}.", f".{short}.")
        for level in range(4):
            new = new.replace(f"down_blocks.{level}.", f"down.{level}.").replace(
                f"up_blocks.{level}.", f"up.{3 - level}."
            )
        new = new.replace(".resnets.", ".block.").replace(".conv_shortcut.", ".nin_shortcut.")
        new = new.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        new = new.replace("conv_norm_out.", "norm_out.")
        is_projection = ".attn_1." in new and tensor.ndim == 2
        renamed["first_stage_model." + new] = tensor[..., None, None] if is_projection else tensor
    return renamed


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return CLIP-G in OpenCLIP's layout: q, k, v stacked, the projection transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    prefix = "conditioner.embedders.1.model."
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    renames = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for i in range(sum(name.endswith("layer_norm1.weight") for name in state)):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            projections = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{new}attn.in_proj_{kind}"] = torch.cat(projections)
            tensors[f"{new}attn.out_proj.{kind}"] = state[f"{old}self_attn.out_proj.{kind}"]
            tensors |= {f"{new}{b}.{kind}": state[f"{old}{a}.{kind}"] for a, b in renames.items()}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _rounded(module):
    """Round weights to float16, as files store them, in float32."""
    return module.half().float().eval().requires_grad_(False)
