"""SD 1.5 from prompt to image, against modules of diffusers and transformers.

The reference follows the published formulas step by step, in float32.
"""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tests.support import tiny_models
from transformers import CLIPTextModel, CLIPTokenizer

from alphalayer import catalog
from alphalayer.core.errors import LayerDiffuseMissing, ModelUnusable
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.base import GeneratedImage
from alphalayer.engine.families import sd15
from alphalayer.engine.families.stable_diffusion import StableDiffusion
from alphalayer.engine.memory import choose_precision
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.transparency.patch import PatchFile

PROMPT, NEGATIVE = "a red apple, high quality", "bad"
REQUEST = GenerationRequest(
    prompt=PROMPT,
    negative_prompt=NEGATIVE,
    seed=7,
    steps=4,
    width=64,
    height=72,
    noise="cpu",
    mode="opaque",
    model="folder",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a models folder with the tiny model as a folder and as a single file."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_sd15_folder(folder / "Stable-diffusion" / "folder")
    tiny_models.make_sd15_file(folder / "Stable-diffusion" / "single.safetensors")
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> LocalEngine:
    return LocalEngine(models, device="cpu")


@pytest.fixture(scope="module")
def model(models: Path) -> StableDiffusion:
    return load(models, "folder")


def load(models: Path, name: str) -> StableDiffusion:
    entry = catalog.resolve_model(name, catalog.find_models(models), models)
    return sd15.load_model(entry, choose_precision(torch.device("cpu"), "auto"), models)


def encode(folder: Path, text: str, clip_skip: int = 1) -> torch.Tensor:
    """Return the hidden states of a text after the final norm (1, 77, width)."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    encoder = encoder.half().float().eval()
    ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    output = encoder(ids, output_hidden_states=True)
    norm = next(
        layer for name, layer in encoder.named_modules() if name.endswith("final_layer_norm")
    )
    last = norm(output.hidden_states[-clip_skip])
    if clip_skip == 1:
        assert torch.equal(last, output.last_hidden_state)
    return last


@torch.no_grad()
def render(folder: Path, request: GenerationRequest, cfg_scale: float) -> np.ndarray:
    """Return the RGB image of a request by DPM++ 2M over Karras' levels, uint8 (H, W, 3)."""
    texts = [
        encode(folder, text, request.clip_skip)
        for text in (request.negative_prompt, request.prompt)
    ]
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    alpha_bar = np.cumprod(1 - np.linspace(*ends, config["num_train_timesteps"]) ** 2)
    table = torch.from_numpy(np.sqrt((1 - alpha_bar) / alpha_bar)).float()
    low, high = float(table[0]) ** (1 / 7), float(table[-1]) ** (1 / 7)
    ramp = torch.linspace(0, 1, request.steps)
    sigmas = torch.cat([(high + ramp * (low - high)) ** 7, torch.zeros(1)])

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval()
    shape = (4, request.height // 8, request.width // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))[None] * sigmas[0]
    previous, previous_h = None, None
    for sigma, following in pairwise(sigmas):
        timestep = (table.log() - sigma.log()).abs().argmin().float()
        scaled = (x / (sigma**2 + 1).sqrt()).repeat(2, 1, 1, 1)
        output = unet(scaled, timestep, encoder_hidden_states=torch.cat(texts)).sample
        uncond, cond = (x - output * sigma).chunk(2)
        clean = uncond + cfg_scale * (cond - uncond)
        if following == 0:
            x = clean
            break
        h = math.log(sigma / following)
        estimate = clean
        if previous is not None:
            estimate = clean + (clean - previous) * (h / previous_h) / 2
        x = following / sigma * x - math.expm1(-h) * estimate
        previous, previous_h = clean, h
    assert vae.config.scaling_factor == 0.18215
    image = (vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)[0]
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def generate(engine: LocalEngine, **changes: object) -> np.ndarray:
    image: GeneratedImage = engine.generate(REQUEST.model_copy(update=changes)).images[0]
    assert (image.rgba[..., 3] == 255).all()
    return image.rgba[..., :3].astype(int)


# Both sides round float32 values that agree to about 1e-5.
@pytest.mark.parametrize(("negative", "clip_skip"), [(NEGATIVE, 1), ("", 2)])
def test_image_equals_the_reference(
    engine: LocalEngine, models: Path, negative: str, clip_skip: int
):
    """The sampler, schedule and CFG scale are the defaults of the family."""
    changes = {"negative_prompt": negative, "clip_skip": clip_skip}
    folder = models / "Stable-diffusion" / "folder"
    expected = render(folder, REQUEST.model_copy(update=changes), cfg_scale=7.0)
    image = generate(engine, **changes)
    assert image.std(axis=(0, 1)).min() > 15, "a flat image would prove nothing"
    assert np.abs(image - expected).max() <= 1


def test_single_file_equals_folder(engine: LocalEngine):
    assert np.abs(generate(engine, model="single") - generate(engine)).max() <= 1


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
@pytest.mark.parametrize("text", [PROMPT, ""])
@torch.inference_mode()
def test_text_equals_transformers(model: StableDiffusion, text: str, clip_skip: int):
    """1e-6 is rounding: the networks add their terms in another order."""
    conditioning = model.text.encode(text, clip_skip)
    expected = encode(model.entry.path, text, clip_skip)
    assert (conditioning.context - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert conditioning.pooled.shape == (1, 0)


def test_learned_word_of_the_family_changes_the_image(
    models: Path, engine: LocalEngine, tmp_path: Path
):
    width, other = tiny_models.WIDTH_L, tiny_models.WIDTH_G
    words = {
        "oldstyle": {"emb_params": torch.ones(2, width)},
        "xlstyle": {"clip_l": torch.ones(2, width), "clip_g": torch.ones(2, other)},
    }
    for name, tensors in words.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    own = LocalEngine(models, device="cpu", embeddings_dir=tmp_path)
    same, changed = (
        np.array_equal(generate(own, prompt=name), generate(engine, prompt=name))
        for name in ("xlstyle", "oldstyle")
    )
    assert same
    assert not changed


def _lora(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], style: str) -> dict:
    """Return a LoRA in the names of kohya, diffusers or PEFT."""
    tensors = {}
    for name, (up, down) in pairs.items():
        network, _, module = name.partition(".")
        if style == "kohya":
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[network]
            stem = prefix + module.replace(".", "_")
            tensors |= {
                f"{stem}.lora_up.weight": up,
                f"{stem}.lora_down.weight": down,
                f"{stem}.alpha": torch.tensor(float(len(down))),
            }
            continue
        stem = name.replace("text_encoder.", "text_encoder.text_model.")
        ends = ("lora.up", "lora.down") if style == "diffusers" else ("lora_B", "lora_A")
        tensors |= {f"{stem}.{ends[0]}.weight": up, f"{stem}.{ends[1]}.weight": down}
    return tensors


@pytest.mark.parametrize("style", ["kohya", "diffusers", "PEFT"])
def test_lora_of_any_names_is_merged(models: Path, style: str, tmp_path: Path):
    model = load(models, "folder")
    modules = {
        "unet.down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1),
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k": (32, 32),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (64, 64),
        "text_encoder.encoder.layers.1.self_attn.q_proj": (32, 32),
    }
    generator = torch.Generator().manual_seed(3)
    pairs = {
        name: (
            torch.randn(out, 2, *ends, generator=generator),
            torch.randn(2, entering, *ends, generator=generator),
        )
        for name, (out, entering, *ends) in modules.items()
    }
    path = tmp_path / "style.safetensors"
    save_file(_lora(pairs, style), path)
    weights = NamedWeights(model.unet), NamedWeights(model.text_encoders[0])
    before = [{name: tensor.clone() for name, tensor in own.items()} for own in weights]
    for part in ("denoiser", "text"):
        model.patchers[part].ensure([(PatchFile.at(path), 0.5)])
        assert model.patchers[part].notes == ()
    changed = set()
    for own, old, prefix in zip(weights, before, ("unet.", "text_encoder."), strict=True):
        for name, tensor in own.items():
            if torch.equal(tensor, old[name]):
                continue
            module = prefix + name.removesuffix(".weight")
            changed.add(module)
            up, down = pairs[module]
            product = (up.flatten(1) @ down.flatten(1)).reshape(tensor.shape)
            expected = (old[name].float() + 0.5 * product).to(tensor.dtype)
            torch.testing.assert_close(tensor, expected)
    assert changed == modules.keys()


def test_lora_of_sdxl_is_refused_with_its_family(models: Path, tmp_path: Path):
    path = tmp_path / "xl.safetensors"
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    down, up = torch.ones(2, 2048), torch.ones(64, 2)
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, path)
    with pytest.raises(ModelUnusable, match="does not fit this model") as error:
        load(models, "folder").patchers["denoiser"].ensure([(PatchFile.at(path), 1.0)])
    assert "made for Stable Diffusion XL" in error.value.hint


def test_prediction_type_and_layer_files_are_those_of_the_model(models: Path, tmp_path: Path):
    folder = tmp_path / "Stable-diffusion"
    folder.mkdir()
    (folder / "v.safetensors").symlink_to(models / "Stable-diffusion" / "single.safetensors")
    (folder / "v.toml").write_text('prediction_type = "v_prediction"')
    for name in ("vae_transparent_encoder", "layer_sd15_vae_transparent_encoder"):
        (tmp_path / "layer_model").mkdir(exist_ok=True)
        (tmp_path / "layer_model" / f"{name}.safetensors").touch()
    model = load(tmp_path, "v")
    assert model.process.prediction == "v"
    path = model.layerdiffuse.encoder()
    assert path
    assert path.name == "layer_sd15_vae_transparent_encoder.safetensors"


def test_checkpoint_of_other_sizes_is_refused(models: Path, tmp_path: Path):
    """Its UNet reads another text width than the text encoder has."""
    tensors = load_file(models / "Stable-diffusion" / "single.safetensors")
    for name in tensors:
        if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
            tensors[name] = torch.cat([tensors[name]] * 2, dim=1)
    (tmp_path / "Stable-diffusion").mkdir()
    save_file(tensors, tmp_path / "Stable-diffusion" / "wide.safetensors")
    message = "the width of the text that the UNet reads: got 64, expected 32"
    with pytest.raises(ModelUnusable, match=message) as error:
        load(tmp_path, "wide")
    assert "complete Stable Diffusion 1.5 model" in error.value.hint


def test_unet_with_pooled_text_is_refused(models: Path, tmp_path: Path):
    """Such a UNet is SDXL's: SD 1.5 has no pooled text."""
    folder = tmp_path / "Stable-diffusion" / "mixed"
    shutil.copytree(models / "Stable-diffusion" / "folder", folder)
    config = folder / "unet" / "config.json"
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8}
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    layers = {"linear_1.weight": (128, 80), "linear_2.weight": (128, 128)}
    layers |= {"linear_1.bias": (128,), "linear_2.bias": (128,)}
    added = {f"add_embedding.{name}": torch.zeros(shape) for name, shape in layers.items()}
    save_file(load_file(file) | added, file)
    with pytest.raises(ModelUnusable, match="pooled text that the UNet reads: got 32, expected 0"):
        load(tmp_path, "mixed")


def test_missing_encoder_is_named_with_its_download(models: Path):
    with pytest.raises(LayerDiffuseMissing, match="layer_sd15_vae_transparent_encoder") as error:
        load(models, "folder").layerdiffuse.required_encoder()
    assert "models pull layerdiffuse-sd15-encoder" in str(error.value.hint)


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_inpainting_checkpoint_reads_mask_and_image(
    models: Path, engine: LocalEngine, tmp_path: Path, scale: float
):
    """Without weights of the mask and the masked image it equals the plain checkpoint."""
    tensors = load_file(models / "Stable-diffusion" / "single.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    more = torch.randn(32, 5, 3, 3, generator=torch.Generator().manual_seed(4)).half() * scale
    tensors[name] = torch.cat([tensors[name], more], dim=1)
    (tmp_path / "Stable-diffusion").mkdir()
    save_file(tensors, tmp_path / "Stable-diffusion" / "inpaint.safetensors")
    image = generate(LocalEngine(tmp_path, device="cpu"), model="inpaint")
    assert np.array_equal(image, generate(engine, model="single")) == (scale == 0)
