"""Families of files, by the names and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a file's tensors by name."""

CONTEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"
LATENT_CHANNELS, INPAINT_CHANNELS = 4, 9
EDM_MARKS = ("edm_mean", "edm_vpred.sigma_max")
VAE_MARKS = ("first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")
CLIP_L = tuple(
    f"conditioner.embedders.0.transformer.{level}embeddings.token_embedding.weight"
    for level in ("text_model.", "")
)
CLIP_G = "conditioner.embedders.1.model.token_embedding.weight"
"""Marks of the text encoders of SDXL. The first has one of two names."""
SD15_TEXT = tuple(name.replace("conditioner.embedders.0", "cond_stage_model") for name in CLIP_L)
"""Marks of the text encoder of SD 1.5: one of two names."""

EMBEDDING = ("clip_l", "clip_g")
"""Names of the vectors of an SDXL embedding. Those of SD 1.5 are one tensor of any name."""
_OTHER_EMBEDDING = ("emb_params", "string_to_param")
_EMBEDDING_WIDTH = 768
"""Width of SD 1.5's vectors."""
_FAMILIES = {768: "sd15", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
_MARKS = (
    ("layerdiffuse-patch", ("::lora::", "::diff::", "hookers.layers.")),
    ("transparent-decoder", ("latent_conv_in.",)),
    (
        "lora",
        (
            "lora_down.",
            "lora_A.",
            "lora_unet_",
            "lora_te",
            "lycoris_",
            "lora.down.",
            "lora_linear_layer.",
            ".hada_w",
            ".lokr_w",
            ".oft_",
            ".ia3_l",
        ),
    ),
    ("controlnet", ("control_model.", "controlnet_cond_embedding.", "input_hint_block.")),
    ("ip-adapter", ("ip_adapter.",)),
    ("flux", ("double_blocks.",)),
    ("sd3", ("joint_blocks.",)),
    ("upscaler", (".RDB1.", ".rdb1.", "conv_first.")),
)
"""Parts of tensor names by the family that has them."""
_DIFFUSERS_CONTEXT = "attentions.0.transformer_blocks.0.attn2.to_k.weight"
_TEXT_ENCODERS = (
    "text_model.encoder.",
    "encoder.block.",
    "transformer.resblocks.",
    "cond_stage_model.",
)

SUPPORTED = ("sdxl", "sd15")
"""Families that the engine renders."""
NOT_CHECKPOINTS = (
    "embedding-other",
    "controlnet",
    "ip-adapter",
    "text-encoder",
    "upscaler",
    "vae",
)
"""Kinds of files that are no model of their own, without those that have a folder here."""
FAMILY_NAMES = {
    "sdxl": "Stable Diffusion XL",
    "sdxl-unet": "Stable Diffusion XL UNet (without both text encoders)",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "sdxl-edm": "Stable Diffusion XL (EDM-trained, as Playground 2.5 and CosXL)",
    "sdxl-other": "Stable Diffusion XL (trained to predict neither epsilon nor v)",
    "sdxl-no-vae": "Stable Diffusion XL (without its whole VAE)",
    "sd15": "Stable Diffusion 1.5",
    "sd15-other": "Stable Diffusion 1.5 (trained to predict neither epsilon nor v)",
    "sd15-no-vae": "Stable Diffusion 1.5 (without its whole VAE)",
    "sd2": "Stable Diffusion 2",
    "sd2-inpaint": "Stable Diffusion 2 inpainting",
    "edit": "image-to-image (as InstructPix2Pix)",
    "ssd-1b": "SSD-1B or Segmind Vega (a distilled Stable Diffusion XL)",
    "layerdiffuse-patch": "LayerDiffuse patch",
    "transparent-decoder": "LayerDiffuse transparent decoder",
    "lora": "LoRA",
    "embedding": "textual-inversion embedding for SDXL (clip_l and clip_g) or SD 1.5",
    "embedding-other": "textual-inversion embedding of another family",
    "sd15-unet": "Stable Diffusion 1.5 UNet (without its text encoder)",
    "sd2-unet": "Stable Diffusion 2 UNet (without its text encoder)",
    "sdxl-refiner-unet": "Stable Diffusion XL refiner UNet (without its text encoder)",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "controlnet": "ControlNet",
    "ip-adapter": "IP-Adapter",
    "text-encoder": "text encoder",
    "upscaler": "upscaler",
    "vae": "VAE",
    "unknown": "unknown kind",
}


def describe(family: str, noun: str = "") -> str:
    """Return what a file is, for messages: "a LoRA", or "of an unknown kind"."""
    if family == "unknown":
        return "of an unknown kind"
    name = f"{FAMILY_NAMES.get(family, family)} {noun}".strip()
    return f"{'an' if name.lower().startswith(('a', 'e', 'i', 'o', 'u')) else 'a'} {name}"


def family_of(shapes: Shapes) -> str:
    """Return the family of a file by its tensors: one of `SUPPORTED`, or another kind."""
    for kind, marks in _MARKS:
        if any(mark in name for name in shapes for mark in marks):
            return kind
    if embedding_shapes(shapes):
        return "embedding"
    if any(mark in name for name in shapes for mark in _OTHER_EMBEDDING):
        return "embedding-other"
    context = shapes.get(CONTEXT)
    if context is None:
        return _without_context(shapes)
    first = shapes.get(FIRST_CONV, (0, LATENT_CHANNELS))
    if len(context) != 2 or len(first) < 2:
        return "unknown"
    has_text = not shapes.keys().isdisjoint(SD15_TEXT)
    family = "sd15" if has_text else _FAMILIES.get(context[1], "unknown")
    is_inpainting = first[1] == INPAINT_CHANNELS
    if is_inpainting and f"{family}-inpaint" in FAMILY_NAMES:
        return f"{family}-inpaint"
    if first[1] > LATENT_CHANNELS and not (is_inpainting and family in SUPPORTED):
        return "edit"
    if CLIP_G in shapes:
        return _sdxl_variant(shapes)
    if family == "sd15":
        return _complete_or_not(family, shapes, SD15_TEXT)
    return "sdxl-unet" if family == "sdxl" else family


def embedding_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an embedding's vectors by name, {} for other files."""
    if shapes.keys() >= {*EMBEDDING}:
        return {name: shapes[name] for name in EMBEDDING}
    (name, shape), *others = [*shapes.items()] or [("", ())]
    is_one = not others and "." not in name and len(shape) in (1, 2)
    return {name: shape} if is_one and shape[-1] == _EMBEDDING_WIDTH else {}


def _complete_or_not(family: str, shapes: Shapes, text: Sequence[str]) -> str:
    """Return the family, with what the checkpoint lacks."""
    if shapes.keys().isdisjoint(text):
        return f"{family}-unet"
    return family if all(mark in shapes for mark in VAE_MARKS) else f"{family}-no-vae"


def _sdxl_variant(shapes: Shapes) -> str:
    """Return the family of a checkpoint that has the text encoders of SDXL."""
    if not _is_full_depth(shapes):
        return "ssd-1b"
    if any(mark in shapes for mark in EDM_MARKS):
        return "sdxl-edm"
    return _complete_or_not("sdxl", shapes, CLIP_L)


def _is_full_depth(shapes: Shapes) -> bool:
    """Return whether the middle block has its transformer, unlike SSD-1B and Vega."""
    return any(name.startswith("model.diffusion_model.middle_block.1.") for name in shapes)


def _without_context(shapes: Shapes) -> str:
    """Return the family of a file that is no whole checkpoint."""
    alone = CONTEXT.removeprefix("model.diffusion_model.")
    contexts = (alone, *(f"down_blocks.{level}.{_DIFFUSERS_CONTEXT}" for level in (0, 1)))
    width = next((shapes[name][-1] for name in contexts if len(shapes.get(name, ())) == 2), None)
    if width in _FAMILIES:
        return f"{_FAMILIES[width]}-unet"
    if any(
        name.startswith(("first_stage_model.", "encoder.conv_in", "decoder.conv_in"))
        for name in shapes
    ):
        return "vae"
    is_text = any(name.startswith(_TEXT_ENCODERS) for name in shapes)
    return "text-encoder" if is_text else "unknown"
