"""Published names of the LayerDiffuse files for SDXL, original and converted.

The first existing file is used.
"""

PATCH_FILES = {
    "attention": (
        "layer_xl_transparent_attn.safetensors",
        "ld_diffusers_sdxl_attn.safetensors",
        "diffuser_layer_xl_transparent_attn.safetensors",
    ),
    "conv": (
        "layer_xl_transparent_conv.safetensors",
        "diffuser_layer_xl_transparent_conv.safetensors",
    ),
}
DECODER_FILES = (
    "vae_transparent_decoder.safetensors",
    "ld_diffusers_sdxl_vae_transparent_decoder.safetensors",
    "diffuser_layer_xl_vae_transparent_decoder.safetensors",
)
