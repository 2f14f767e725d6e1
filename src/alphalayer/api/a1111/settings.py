"""Settings of AUTOMATIC1111, of one request or between the requests of a client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from alphalayer.api.deps import wire_names
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import ClipSkip, Emphasis, GenerationOptions, NoiseSource
from alphalayer.core.samplers import WITHOUT_ETA
from alphalayer.core.values import parse_as
from alphalayer.observability.logging import log

UNIMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", ""),
    "sd_unet": ("Automatic", "None", ""),
    "sd_lora": ("None", ""),
    "sd_hypernetwork": ("None", ""),
    "sd_noise_schedule": ("Default", ""),
    "sd_vae_encode_method": ("Full",),
    "sd_vae_decode_method": ("Full",),
    "forge_additional_modules": ([],),
    "forge_try_reproduce": ("None", ""),
    "forge_unet_storage_dtype": ("Automatic",),
    "fp8_storage": ("Disable",),
    "sigma_min": (0.0,),
    "sigma_max": (0.0,),
    "rho": (0.0,),
    "s_churn": (0.0,),
    "s_tmin": (0.0,),
    "s_tmax": (0.0,),
    "s_noise": (1.0,),
    "s_min_uncond_all": (False,),
    "k_sched_type": ("Automatic",),
    "always_discard_next_to_last_sigma": (False,),
    "sgm_noise_multiplier": (False,),
    "enable_quantization": (False,),
    "skip_early_cond": (0.0,),
    "beta_dist_alpha": (0.6,),
    "beta_dist_beta": (0.6,),
    "ddim_discretize": ("uniform",),
    "uni_pc_variant": ("bh1",),
    "uni_pc_skip_type": ("time_uniform",),
    "uni_pc_order": (3,),
    "uni_pc_lower_order_final": (True,),
    "token_merging_ratio": (0.0,),
    "token_merging_ratio_hr": (0.0,),
    "token_merging_ratio_img2img": (0.0,),
    "initial_noise_multiplier": (1.0,),
    "img2img_extra_noise": (0.0,),
    "img2img_color_correction": (False,),
    "inpainting_mask_weight": (1.0,),
    "overlay_inpaint": (True,),
    "return_mask": (False,),
    "return_mask_composite": (False,),
    "pad_cond_uncond": (False,),
    "pad_cond_uncond_v0": (False,),
    "comma_padding_backtrack": (20,),
    "enable_emphasis": (True,),
    "enable_batch_seeds": (True,),
    "sdxl_clip_l_skip": (False,),
    "tiling": (False,),
    "face_restoration": (False,),
    "extra_networks_default_multiplier": (1.0,),
    "lora_functional": (False,),
    "use_old_emphasis_implementation": (False,),
    "use_old_karras_scheduler_sigmas": (False,),
    "use_old_scheduling": (False,),
    "use_downcasted_alpha_bar": (False,),
    "dont_fix_second_order_samplers_schedule": (False,),
    "no_dpmpp_sde_batch_determinism": (False,),
}
"""Settings that change the image and are not implemented, with the values that are accepted.

The first value is the default. Source: the options of Forge's API.
"""
INFOTEXT_NAMES = {
    "clip skip": "CLIP_stop_at_last_layers",
    "ensd": "eta_noise_seed_delta",
    "rng": "randn_source",
    "ngms": "s_min_uncond",
    "model": "sd_model_checkpoint",
    "sd model": "sd_model_checkpoint",
    "checkpoint": "sd_model_checkpoint",
    "sd checkpoint": "sd_model_checkpoint",
    "vae": "sd_vae",
}
"""Settings by their names in infotext and by other words, in lower case."""
OPTION_NAMES = {
    "noise_seed_delta": "eta_noise_seed_delta",
    "emphasis": "emphasis",
    "crop_top": "sdxl_crop_top",
    "crop_left": "sdxl_crop_left",
    "min_uncond": "s_min_uncond",
}
"""Settings by the names of `GenerationOptions`."""
SHORTEST_COMPARED = 6
"""Shorter names are not compared: too many other words are like them."""


NOTHING = ("", "0", "0.0", "false", "no", "none", "off", "null")
"""Texts with which clients leave a field unused, in lower case."""
FALSE = ("", "false")
"""Texts that clients send for a false or empty value."""


def is_used(value: Any) -> bool:
    """Return whether the value of a field requests something."""
    # not all of a text, which may be an image
    text = value[:100] if isinstance(value, str) else str(value)
    return bool(value) and text.strip().lower() not in NOTHING


def _in_any_case(*names: str) -> BeforeValidator:
    """Return a reader of one of `names` in any case. An empty text is not set."""
    by_lower = {name.lower(): name for name in names} | {"": None}

    def read(value: Any) -> Any:
        return by_lower.get(value.strip().lower(), value) if isinstance(value, str) else value

    return BeforeValidator(read)


RandnSource = Literal["NV", "CPU", "GPU"]
WHITE = "#ffffff"


class OverrideSettings(BaseModel):
    """Settings of AUTOMATIC1111. Settings without effect on the image are ignored."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    sd_model_checkpoint: Annotated[
        Annotated[str, StringConstraints(strip_whitespace=True)] | None,
        Field(max_length=500, description="Model name, title or hash. Empty: not set."),
    ] = None
    CLIP_stop_at_last_layers: ClipSkip | None = None
    live_previews_enable: Annotated[
        bool | None, Field(description="Whether `progress` has an image.")
    ] = None
    randn_source: Annotated[
        RandnSource | None,
        Field(description="Source of noise."),
        _in_any_case(*get_args(RandnSource)),
    ] = None
    emphasis: Annotated[
        Emphasis | None,
        Field(description="How attention weights act."),
        _in_any_case(*get_args(Emphasis)),
    ] = None
    eta_noise_seed_delta: Annotated[
        int | None, Field(description="Added to the seed of the sampler's noise.")
    ] = None
    eta_ancestral: Annotated[
        float | None, Field(description="Share of fresh noise in each step, from 0 to 1.")
    ] = None
    eta_ddim: Annotated[
        float | None, Field(description="The same for DDIM, whose default is 0.")
    ] = None
    s_min_uncond: Annotated[
        float | None,
        Field(description="Noise level below which every second step has no guidance."),
    ] = None
    sdxl_crop_top: Annotated[int | None, Field(description="Crop that SDXL sees.")] = None
    sdxl_crop_left: Annotated[int | None, Field(description="Crop that SDXL sees.")] = None
    enable_prompt_comments: Annotated[
        bool | None, Field(description="Whether # starts a comment in a prompt.")
    ] = None
    img2img_fix_steps: Annotated[
        bool | None, Field(description="Whether img2img makes all its steps.")
    ] = None
    img2img_background_color: Annotated[
        Annotated[str, Field(pattern=validation.COLOUR)] | None,
        Field(description="Colour behind the image to change, if LayerDiffuse is off."),
        _in_any_case(),
    ] = None

    @property
    def values(self) -> dict[str, Any]:
        """Return the implemented settings that are set."""
        values = ((name, getattr(self, name)) for name in OverrideSettings.model_fields)
        return {name: value for name, value in values if value not in (None, "")}

    @classmethod
    def of_stored(cls, stored: Mapping[str, Any]) -> OverrideSettings:
        """Return stored settings without those that are not valid.

        A service of another version may have stored other values.
        """
        valid: dict[str, Any] = {}
        for name in cls.model_fields.keys() & stored.keys():
            try:
                cls.model_validate({name: stored[name]}).check_range()
            except (ValidationError, InvalidRequest):
                log.warning("option.ignored", option=name)
            else:
                valid[name] = stored[name]
        return cls.model_validate(valid)

    @property
    def noise(self) -> NoiseSource | None:
        """Return the source of noise, None if it is not set."""
        return cast("NoiseSource", self.randn_source.lower()) if self.randn_source else None

    @property
    def background(self) -> str:
        """Return the colour behind an image to change."""
        return self.img2img_background_color or WHITE

    def over(self, other: OverrideSettings) -> OverrideSettings:
        """Return these settings, and those of `other` that are not set here."""
        return other.model_copy(update=self.values)

    def reject_unimplemented(self, prefix: str = "") -> None:
        """Check the settings that are not implemented.

        Args:
            prefix: Put before the name of the field in the error.

        Raises:
            InvalidRequest: A setting would change the image, or is misspelled.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or any(
                _is_same(value, other) for other in UNIMPLEMENTED.get(name, ())
            ):
                continue
            if name in UNIMPLEMENTED:
                raise InvalidRequest(
                    f"this is not implemented; only {validation.shown(UNIMPLEMENTED[name][0])} is.",
                    hint="Leave it out.",
                    field=f"{prefix}{name}",
                )
            if similar := _find_similar(name):
                raise InvalidRequest(
                    "there is no such setting.",
                    hint=f'Did you mean "{similar}"?',
                    field=f"{prefix}{validation.cut(name)}",
                )

    def check_range(self) -> None:
        """Check the values of options. Raises `InvalidRequest`."""
        for sampler in ("Euler a", "DDIM"):
            self.options(sampler)

    def options(
        self,
        sampler: str | None,
        prefix: str = "",
        eta: float | None = None,
        min_uncond: float | None = None,
        second_sampler: str | None = None,
    ) -> GenerationOptions:
        """Return the options of a request.

        Args:
            sampler: The sampler. DDIM has its own eta.
            prefix: Put before the name of the field in the error.
            eta: The body's `eta`, which precedes the settings.
            min_uncond: The body's `s_min_uncond`, which precedes the settings.
            second_sampler: The sampler of the second pass, if it has one of its own.

        Raises:
            InvalidRequest: A value is out of range.
        """
        names = {
            **OPTION_NAMES,
            "eta": _eta_name(sampler),
            "hires_eta": _eta_name(second_sampler or sampler),
        }
        options = {option: getattr(self, name) for option, name in names.items()}
        names = {option: f"{prefix}{name}" for option, name in names.items()}
        if eta is not None:
            options |= {"eta": eta, "hires_eta": eta}
            names |= {"eta": "eta", "hires_eta": "eta"}
        if min_uncond is not None:
            options["min_uncond"], names["min_uncond"] = min_uncond, "s_min_uncond"
        used = {option: value for option, value in options.items() if value is not None}
        with wire_names(names):
            parsed = parse_as(GenerationOptions, used)
        return parsed.model_copy(update=_used_eta(parsed, sampler, second_sampler))


def current_options(
    settings: OverrideSettings, noise: NoiseSource, *, comments: bool
) -> dict[str, Any]:
    """Return the settings that clients read.

    Args:
        settings: Settings of the client.
        noise: Source of noise of the service.
        comments: Whether "#" starts a comment in prompts for the service.
    """
    options = GenerationOptions()
    return {
        "sd_model_checkpoint": "",
        "sd_checkpoint_hash": "",
        "CLIP_stop_at_last_layers": 1,
        "live_previews_enable": False,
        "samples_format": "png",
        "randn_source": noise.upper(),
        **{setting: getattr(options, name) for name, setting in OPTION_NAMES.items()},
        "eta_ancestral": 1.0,
        "eta_ddim": 0.0,
        "enable_prompt_comments": comments,
        "img2img_fix_steps": False,
        "img2img_background_color": WHITE,
        "samples_save": True,
        "grid_save": False,
        "return_grid": False,
        "enable_pnginfo": True,
        "add_model_name_to_info": True,
        "add_model_hash_to_info": True,
        "add_version_to_infotext": True,
        **{name: accepted[0] for name, accepted in UNIMPLEMENTED.items()},
        **settings.values,
    }


def _used_eta(
    options: GenerationOptions, sampler: str | None, second_sampler: str | None
) -> dict[str, float | None]:
    """Return `eta` and `hires_eta` of options, None where the image has them anyway."""
    eta = _own_eta(options.eta, sampler)
    if not second_sampler or second_sampler in WITHOUT_ETA:
        return {"eta": eta, "hires_eta": None}
    default = _default_eta(second_sampler)
    inherited = default if eta is None else eta
    second = default if options.hires_eta is None else options.hires_eta
    return {"eta": eta, "hires_eta": None if second == inherited else second}


def _own_eta(eta: float | None, sampler: str | None) -> float | None:
    """Return the share of fresh noise, None for a sampler's default or one without it."""
    return None if sampler in WITHOUT_ETA or eta == _default_eta(sampler) else eta


def _eta_name(sampler: str | None) -> str:
    return "eta_ddim" if (sampler or "").startswith("DDIM") else "eta_ancestral"


def _default_eta(sampler: str | None) -> float:
    return 0.0 if _eta_name(sampler) == "eta_ddim" else 1.0


def _is_same(value: Any, accepted: Any) -> bool:
    """Return whether two values are equal. Clients send some values as text."""
    if isinstance(value, str):
        value = value.strip().lower()
        if isinstance(accepted, str):
            return value == accepted.lower()
        if value in FALSE:
            return not accepted
        if value == "true":
            return accepted is True
    try:
        return float(value) == float(accepted)
    except (TypeError, ValueError, OverflowError):
        return value == accepted


def _find_similar(name: str) -> str | None:
    """Return the setting that a misspelled name means, None for any other name."""
    plain = validation.cut(name).lower()
    if setting := INFOTEXT_NAMES.get(plain.replace("_", " ")):
        return setting
    if len(plain) < SHORTEST_COMPARED:
        return None
    return next((_SIMILAR[other] for other in _shorten(plain) if other in _SIMILAR), None)


def _shorten(name: str) -> Iterable[str]:
    """Yield a name, and the name without each of its characters.

    Two names with one of these in common differ in at most one character, or in the order of two.
    """
    yield name
    for index in range(len(name)):
        yield name[:index] + name[index + 1 :]


_SIMILAR = {
    other: name
    for name in (*OverrideSettings.model_fields, *UNIMPLEMENTED)
    if len(name) >= SHORTEST_COMPARED
    for other in _shorten(name.lower())
}
"""Settings by what their names share with misspelled ones."""
