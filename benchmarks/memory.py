"""Memory of an image in each memory mode, counted from the shapes of SDXL or SD 1.5.

    python -m benchmarks.memory [--family …] [--width …] [--height …] [--images …] [--dtype …]

The table has GiB of weights + activations for each stage, and the largest sum. It needs neither a
model nor a GPU. What a count includes is in `alphalayer.engine.memory_count`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from alphalayer import catalog
from alphalayer.engine.families.clip_files import TEXT_STORED
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.memory import GIB, MEMORY_MODES, Precision
from alphalayer.engine.memory_count import Networks, count_memory
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.networks.transparent import TransparentDecoder
from alphalayer.engine.networks.unet import UNet, UNetConfig
from alphalayer.engine.networks.vae import AutoencoderKL

PRECISIONS = {
    "fp16": Precision(torch.float16, torch.bfloat16, torch.float16),
    "fp32": Precision(torch.float32, torch.float32, torch.float32),
}


def sdxl_networks(precision: Precision) -> Networks:
    """Build SDXL with LayerDiffuse on the meta device, from the shipped configs."""
    configs = {
        part: catalog.read_json(SHIPPED / part / "config.json")
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    with torch.device("meta"):
        return Networks(
            [
                ClipTextModel(
                    vocabulary=config["vocab_size"],
                    positions=config["max_position_embeddings"],
                    width=config["hidden_size"],
                    inner_width=config["intermediate_size"],
                    layers=config["num_hidden_layers"],
                    heads=config["num_attention_heads"],
                    projection=projection,
                ).to(TEXT_STORED)
                for config, projection in (
                    (configs["text_encoder"], None),
                    (configs["text_encoder_2"], configs["text_encoder_2"]["projection_dim"]),
                )
            ],
            UNet(UNetConfig.of(configs["unet"])).to(precision.unet),
            AutoencoderKL(configs["vae"]).to(precision.vae),
            TransparentDecoder().to(precision.decoder),
        )


def sd15_networks(precision: Precision) -> Networks:
    """Build SD 1.5 with LayerDiffuse on the meta device. Only UNet and text differ from SDXL."""
    sdxl = sdxl_networks(precision)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    with torch.device("meta"):
        unet = UNet(UNetConfig.of(config)).to(precision.unet)
    return replace(sdxl, text=sdxl.text[:1], denoiser=unet)


FAMILIES = {"sdxl": sdxl_networks, "sd15": sd15_networks}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="sdxl")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--images", type=int, default=1, help="images generated together")
    parser.add_argument("--dtype", choices=PRECISIONS, default="fp16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    networks = FAMILIES[options.family](PRECISIONS[options.dtype])
    for name, mode in MEMORY_MODES.items():
        stages = count_memory(
            networks,
            options.width,
            options.height,
            options.images,
            mode,
            torch.device(options.device),
        )
        columns = [
            f"{stage} {memory.weights / GIB:.2f} + {memory.activations / GIB:.2f}"
            for stage, memory in stages.items()
        ]
        peak = max(memory.total for memory in stages.values()) / GIB
        print(f"{name:9}" + "".join(f"{column:22}" for column in columns) + f"peak {peak:.2f}")


if __name__ == "__main__":
    main()
