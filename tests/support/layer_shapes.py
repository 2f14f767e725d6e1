"""Names and shapes of the tensors of the published LayerDiffuse files."""

from __future__ import annotations

import re
from itertools import pairwise

from alphalayer.catalog.kinds import ENCODER_SHAPES

Shapes = dict[str, tuple[int, ...]]
RANK, CONTEXT, EMBEDDING = 256, 2048, 1280
QUERIES = re.compile(r"\.to_[qkv]\.weight$")
ATTENTION = re.compile(r"\.(?:to_[qkv]|to_out\.0)\.weight$")


def layer_shapes() -> dict[str, Shapes]:
    """Return the tensors of each file by its name without suffix. Decoders have two of theirs."""
    convolutions, transformers = _sdxl_unet()
    others = {name: shape for name, shape in transformers.items() if not QUERIES.search(name)}
    encoder: Shapes = {}
    for weight, shape in ENCODER_SHAPES.items():
        encoder |= _layer(weight.removesuffix(".weight"), *shape)
    decoder = _layer("latent_conv_in", 64, 4, 1, 1)
    return {
        "layer_xl_transparent_attn": _low_rank(transformers),
        "layer_xl_transparent_conv": _differences({**convolutions, **others}, 4),
        "layer_xl_fg2ble": _differences(convolutions, 8),
        "layer_xl_bg2ble": _differences(convolutions, 8),
        "layer_xl_fgble2bg": _differences(convolutions, 12),
        "layer_xl_bgble2fg": _differences({**convolutions, **others}, 12),
        "vae_transparent_decoder": decoder,
        "layer_sd15_vae_transparent_decoder": decoder,
        "vae_transparent_encoder": encoder,
        "layer_sd15_vae_transparent_encoder": encoder,
        "layer_sd15_transparent_attn": _sharing(1),
        "layer_sd15_joint": _sharing(3),
        "layer_sd15_fg2bg": _sharing(2, has_control=True),
        "layer_sd15_bg2fg": _sharing(2, has_control=True),
    }


def _layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _low_rank(layers: Shapes) -> Shapes:
    shapes: Shapes = {}
    for name, shape in layers.items():
        if ATTENTION.search(name):
            shapes[f"diffusion_model.{name}::lora::0"] = (shape[0], RANK)
            shapes[f"diffusion_model.{name}::lora::1"] = (RANK, shape[1])
    return shapes


def _differences(layers: Shapes, channels: int) -> Shapes:
    first = {"input_blocks.0.0.weight": (320, channels, 3, 3)}
    return {
        f"diffusion_model.{name}::diff::0": shape for name, shape in {**layers, **first}.items()
    }


def _sdxl_unet() -> tuple[Shapes, Shapes]:
    """Return the tensors outside and inside of transformers, without those of the embeddings."""
    convolutions = {
        **_layer("input_blocks.0.0", 320, 4, 3, 3),
        **_layer("out.0", 320),
        **_layer("out.2", 4, 320, 3, 3),
    }
    for name, width in (("input_blocks.3.0.op", 320), ("input_blocks.6.0.op", 640)):
        convolutions |= _layer(name, width, width, 3, 3)
    for name, width in (("output_blocks.2.2.conv", 1280), ("output_blocks.5.2.conv", 640)):
        convolutions |= _layer(name, width, width, 3, 3)
    down = {1: (320, 320), 2: (320, 320), 4: (320, 640), 5: (640, 640), 7: (640, 1280)}
    blocks = {f"input_blocks.{index}": widths for index, widths in down.items()}
    blocks |= dict.fromkeys(("input_blocks.8", "middle_block"), (1280, 1280))
    entering = (2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640)
    for index, width in enumerate(entering):
        blocks[f"output_blocks.{index}"] = (width, (1280, 640, 320)[index // 3])
    depths = {320: 0, 640: 2, 1280: 10}
    transformers: Shapes = {}
    for name, (before, after) in blocks.items():
        convolutions |= _residual(f"{name}.0", before, after)
        if depths[after]:
            transformers |= _transformer(f"{name}.1", after, depths[after])
    convolutions |= _residual("middle_block.2", 1280, 1280)
    return convolutions, transformers


def _residual(name: str, before: int, after: int) -> Shapes:
    skip = _layer(f"{name}.skip_connection", after, before, 1, 1) if before != after else {}
    return {
        **_layer(f"{name}.in_layers.0", before),
        **_layer(f"{name}.in_layers.2", after, before, 3, 3),
        **_layer(f"{name}.emb_layers.1", after, EMBEDDING),
        **_layer(f"{name}.out_layers.0", after),
        **_layer(f"{name}.out_layers.3", after, after, 3, 3),
        **skip,
    }


def _transformer(name: str, width: int, depth: int) -> Shapes:
    shapes = _layer(f"{name}.norm", width)
    for projection in ("proj_in", "proj_out"):
        shapes |= _layer(f"{name}.{projection}", width, width)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for number in (1, 2, 3):
            shapes |= _layer(f"{block}.norm{number}", width)
        for attention, context in (("attn1", width), ("attn2", CONTEXT)):
            shapes[f"{block}.{attention}.to_q.weight"] = (width, width)
            for part in ("to_k", "to_v"):
                shapes[f"{block}.{attention}.{part}.weight"] = (width, context)
            shapes |= _layer(f"{block}.{attention}.to_out.0", width, width)
        shapes |= _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        shapes |= _layer(f"{block}.ff.net.2", width, 4 * width)
    return shapes


def _sharing(frames: int, *, has_control: bool = False) -> Shapes:
    """Return the tensors of a file for SD 1.5."""
    widths = [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280]
    shapes: Shapes = {}
    for index, width in enumerate(width for width in widths for _ in ("attn1", "attn2")):
        unit, context = f"hookers.layers.{index}", 768 if index % 2 else width
        for frame in range(frames):
            for part in ("q", "k", "v", "out"):
                entering = context if part in "kv" else width
                name = f"{unit}.to_{part}_lora.{frame}"
                shapes[f"{name}.down.weight"] = (RANK, entering)
                shapes[f"{name}.up.weight"] = (width, RANK)
            if has_control:
                shapes |= _layer(f"{unit}.control_convs.{frame}.0", 256, 256, 3, 3)
                shapes |= _layer(f"{unit}.control_convs.{frame}.2", width, 256, 1, 1)
        for part in "iqkvo":
            shapes |= _layer(f"{unit}.temporal_{part}", width, width)
        shapes |= _layer(f"{unit}.temporal_n", width)
    if has_control:
        down = (3, 32, 32, 64, 64, 128, 128, 256, 256)
        for level, sizes in enumerate((down, *[(256, 256, 256)] * 3)):
            for number, (before, after) in enumerate(pairwise(sizes)):
                name = f"kwargs_encoder.blocks_{level}.{2 * number}"
                shapes |= _layer(name, after, before, 3, 3)
    return shapes
