"""Modes of LayerDiffuse as data: names, labels, files and input images.

The mathematics of a mode is a row of `alphalayer.engine.transparency.modes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alphalayer.core.errors import InvalidRequest

ConditionRole = Literal["foreground", "background", "blended"]
"""What an input image of a mode is to the images that are generated."""
InputRole = Literal["init", "mask", "foreground", "background", "blended"]
"""What an input image is. Any mode can start from "init", and change the part of "mask"."""
LayerRole = Literal["image", "foreground", "background", "blended", "composite"]
"""What a layer of a result is.

"image" is the one layer of a mode without inputs. "composite" is the foreground over the
background.
"""


@dataclass(frozen=True)
class Mode:
    """One way to generate transparency, as catalog, download, infotext and dialects know it."""

    name: str
    label: str
    """Name of the method in AUTOMATIC1111's script and in infotext."""
    files: tuple[str, ...] = ()
    """Published names of the weight patch, original and converted; the first existing is used."""
    download: str = "layerdiffuse"
    """Name of the patch for `alphalayer models pull`."""
    family: str = "sdxl"
    """Family of the models that it runs with."""
    needs: tuple[ConditionRole, ...] = ()
    """Input images, in the order of their channels."""
    layers: tuple[LayerRole, ...] = ("image",)
    """Layers of one set. Each is an image of the batch with a seed of its own."""
    sampler: str | None = None
    """Sampler that its authors recommend. None: that of the model."""
    stop_at: float = 1.0
    """Fraction of the schedule during which its authors recommend to use the patch."""
    has_alpha: bool = True
    """Whether the transparent decoder makes its image or foreground. The others are opaque."""

    @property
    def layer_roles(self) -> tuple[LayerRole, ...]:
        """Return the roles of its layers in a document, where "image" is the foreground."""
        return tuple("foreground" if role == "image" else role for role in self.layers)

    def is_transparent(self, role: LayerRole) -> bool:
        """Return whether the transparent decoder makes a layer."""
        return self.has_alpha and role in ("image", "foreground")

    @property
    def shares_attention(self) -> bool:
        """Return whether the images of a set attend to each other."""
        return self.family == "sd15" and bool(self.files)


FAMILIES = {"sdxl": "SDXL", "sd15": "SD 1.5"}
"""Families that the modes are for, with their names in messages."""
MODES = {
    mode.name: mode
    for mode in (
        Mode(
            name="attention",
            label="(SDXL) Only Generate Transparent Image (Attention Injection)",
            files=(
                "layer_xl_transparent_attn.safetensors",
                "ld_diffusers_sdxl_attn.safetensors",
                "diffuser_layer_xl_transparent_attn.safetensors",
            ),
        ),
        Mode(
            name="conv",
            label="(SDXL) Only Generate Transparent Image (Conv Injection)",
            files=(
                "layer_xl_transparent_conv.safetensors",
                "diffuser_layer_xl_transparent_conv.safetensors",
            ),
            download="layerdiffuse-conv",
        ),
        Mode(
            name="fg2ble",
            label="(SDXL) From Foreground to Blending",
            files=(
                "layer_xl_fg2ble.safetensors",
                "diffuser_layer_xl_fg2ble.safetensors",
            ),
            download="layerdiffuse-fg2ble",
            needs=("foreground",),
            layers=("blended",),
            has_alpha=False,
        ),
        Mode(
            name="fgble2bg",
            label="(SDXL) From Foreground and Blending to Background",
            files=(
                "layer_xl_fgble2bg.safetensors",
                "diffuser_layer_xl_fgble2bg.safetensors",
            ),
            download="layerdiffuse-fgble2bg",
            needs=("foreground", "blended"),
            layers=("background",),
            sampler="Euler a",
            stop_at=0.5,
            has_alpha=False,
        ),
        Mode(
            name="bg2ble",
            label="(SDXL) From Background to Blending",
            files=(
                "layer_xl_bg2ble.safetensors",
                "diffuser_layer_xl_bg2ble.safetensors",
            ),
            download="layerdiffuse-bg2ble",
            needs=("background",),
            layers=("blended",),
            has_alpha=False,
        ),
        Mode(
            name="bgble2fg",
            label="(SDXL) From Background and Blending to Foreground",
            files=(
                "layer_xl_bgble2fg.safetensors",
                "diffuser_layer_xl_bgble2fg.safetensors",
            ),
            download="layerdiffuse-bgble2fg",
            needs=("background", "blended"),
            layers=("foreground",),
            sampler="Euler a",
        ),
        Mode(
            name="sd15_attention",
            label="(SD1.5) Only Generate Transparent Image (Attention Injection)",
            files=("layer_sd15_transparent_attn.safetensors",),
            download="layerdiffuse-sd15",
            family="sd15",
        ),
        Mode(
            name="sd15_fg2bg",
            label="(SD1.5) From Foreground to Background (need batch size 2)",
            files=("layer_sd15_fg2bg.safetensors",),
            download="layerdiffuse-sd15-fg2bg",
            family="sd15",
            needs=("foreground",),
            layers=("background", "blended"),
            has_alpha=False,
        ),
        Mode(
            name="sd15_bg2fg",
            label="(SD1.5) From Background to Foreground (need batch size 2)",
            files=("layer_sd15_bg2fg.safetensors",),
            download="layerdiffuse-sd15-bg2fg",
            family="sd15",
            needs=("background",),
            layers=("foreground", "blended"),
        ),
        Mode(
            name="sd15_joint",
            label="(SD1.5) Generate Everything Together (need batch size 3)",
            files=("layer_sd15_joint.safetensors",),
            download="layerdiffuse-sd15-joint",
            family="sd15",
            layers=("foreground", "background", "blended"),
        ),
        Mode(name="opaque", label="", has_alpha=False),
    )
}
"""All modes by name. "opaque" is LayerDiffuse off."""
DEFAULT_MODE = "attention"
OPAQUE = "opaque"
DECODER_FILES = {
    "sdxl": (
        "vae_transparent_decoder.safetensors",
        "ld_diffusers_sdxl_vae_transparent_decoder.safetensors",
        "diffuser_layer_xl_vae_transparent_decoder.safetensors",
    ),
    "sd15": ("layer_sd15_vae_transparent_decoder.safetensors",),
}
"""Published names of the transparent decoder by family."""
ENCODER_FILES = {
    "sdxl": ("vae_transparent_encoder.safetensors",),
    "sd15": ("layer_sd15_vae_transparent_encoder.safetensors",),
}
"""Published names of the transparent encoder by family."""
ENCODER_DOWNLOADS = {"sdxl": "layerdiffuse-encoder", "sd15": "layerdiffuse-sd15-encoder"}
"""Names of the transparent encoders for `alphalayer models pull`, by family."""


def mode_for(family: str, name: str) -> Mode:
    """Return the mode that a requested one means for a model of a family.

    The default mode means the first one of the family. "opaque" fits all families.

    Raises:
        InvalidRequest: The mode is one of another family.
    """
    fitting = [mode for mode in MODES.values() if mode.family == family and mode.files]
    if name == DEFAULT_MODE and fitting:
        return fitting[0]
    if name == OPAQUE or MODES[name] in fitting:
        return MODES[name]
    names = ", ".join(f'"{mode.name}"' for mode in (*fitting, MODES[OPAQUE]))
    raise InvalidRequest(
        f'mode "{name}" is one of {FAMILIES[MODES[name].family]}; '
        f"the model is one of {FAMILIES[family]}.",
        hint=f"Use {names}, or a model of the other family.",
        field="mode",
    )
