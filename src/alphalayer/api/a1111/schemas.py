"""Bodies and responses of the AUTOMATIC1111 dialect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from alphalayer.api.a1111.hires import HIRES_FIELDS, HiresBody
from alphalayer.api.a1111.lists import SCHEDULES, expand_aliases
from alphalayer.api.a1111.script import SCRIPT, Arguments, read_arguments
from alphalayer.api.a1111.settings import OverrideSettings, is_used
from alphalayer.api.deps import Service, wire_names
from alphalayer.api.schemas import Body, reject_unused_options
from alphalayer.catalog import EMBEDDED_MODEL, ModelEntry, public_path
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import Iterations, JobSpec, Output, Postprocessing
from alphalayer.core.modes import OPAQUE, InputRole
from alphalayer.core.prompts import remove_tags
from alphalayer.core.request import (
    BatchSize,
    CfgScale,
    GenerationRequest,
    Height,
    ImageInput,
    NegativePrompt,
    Prompt,
    Seed,
    Steps,
    Subseed,
    SubseedStrength,
    Width,
)
from alphalayer.core.samplers import AUTOMATIC, choose_sampler
from alphalayer.core.values import copy_fields

FIELDS = {
    **HIRES_FIELDS,
    "sampler": "sampler_name",
    "model": "override_settings.sd_model_checkpoint",
    "iterations": "n_iter",
    "loras": "prompt",
    "mode": f"alwayson_scripts.{SCRIPT}.args",
    "inputs": f"alwayson_scripts.{SCRIPT}.args",
}
"""Names of fields on the wire, where they differ from those of `JobSpec`."""
NOT_IMPLEMENTED = "Not implemented; refused if it would change the image."
OVERRIDE = "override_settings."
FIELDS_AS_SCRIPTS = ("sampler", "seed")
"""Scripts of AUTOMATIC1111's page whose values are fields of the body."""
SWITCHES = ("enabled", "ad_tab_enable", "ad_model")
"""Keys that switch a unit of ControlNet or ADetailer off. Without them it is on."""
ECHOED: dict[str, Any] = {
    "prompt": "",
    "negative_prompt": "",
    "styles": None,
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0.0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": None,
    "scheduler": None,
    "batch_size": 1,
    "n_iter": 1,
    "steps": 50,
    "cfg_scale": 7.0,
    "distilled_cfg_scale": 3.5,
    "width": 512,
    "height": 512,
    "restore_faces": None,
    "tiling": None,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "eta": None,
    "denoising_strength": None,
    "s_min_uncond": None,
    "s_churn": None,
    "s_tmax": None,
    "s_tmin": None,
    "s_noise": None,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "refiner_checkpoint": None,
    "refiner_switch_at": None,
    "disable_extra_networks": False,
    "firstpass_image": None,
    "comments": None,
    "enable_hr": False,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "hr_scale": 2.0,
    "hr_upscaler": None,
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_additional_modules": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "hr_cfg": None,
    "hr_distilled_cfg": 3.5,
    "force_task_id": None,
    "sampler_index": "Euler",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "infotext": None,
}
"""Fields that `parameters` of a response repeats, with the defaults of Forge."""


def _list_arguments(args: Any) -> Any:
    """Return arguments as a list.

    Some programs send an object with the positions as keys.
    """
    if args is None:
        return []
    if not isinstance(args, dict):
        return args
    positions = cast("dict[str, Any]", args)
    names = [str(index) for index in range(len(positions))]
    return [positions[name] for name in names] if {*names} == {*positions} else [positions]


class Script(BaseModel):
    """Arguments of one script."""

    args: Annotated[
        list[Any],
        BeforeValidator(_list_arguments),
        Field(description="In the order of `script-info`. A missing tail keeps its defaults."),
    ] = []


class Txt2ImgRequest(HiresBody, Body, Postprocessing, frozen=True):
    """Body of `POST /sdapi/v1/txt2img`, with the defaults of AUTOMATIC1111.

    Unknown fields are ignored, as AUTOMATIC1111 does. The fields of postprocessing are extensions.
    """

    model_config = ConfigDict(
        extra="ignore",
        title="A1111Txt2ImgRequest",
        json_schema_extra={
            "examples": [
                {"prompt": "an apple, high quality", "steps": 20, "width": 1024, "height": 1024}
            ]
        },
    )

    carries_images: ClassVar[bool] = True

    prompt: Annotated[Prompt, Field(validate_default=True)] = ""
    negative_prompt: NegativePrompt = ""
    seed: Seed = -1
    subseed: Subseed = -1
    subseed_strength: SubseedStrength = 0.0
    sampler_name: Annotated[
        str | None,
        Field(max_length=100, description="One of `samplers`, also with its schedule."),
    ] = None
    sampler_index: Annotated[
        str, Field(max_length=100, description="Former name of sampler_name.")
    ] = "Euler"
    scheduler: Annotated[
        str | None, Field(max_length=100, description="One of `schedulers`, by name or label.")
    ] = None
    batch_size: BatchSize = 1
    n_iter: Iterations = 1
    steps: Steps = 50
    cfg_scale: CfgScale = 7.0
    width: Width = 512
    height: Height = 512
    override_settings: Annotated[
        OverrideSettings, Field(description="Settings for this request alone.")
    ] = OverrideSettings()
    send_images: Annotated[bool, Field(description="Whether the response holds the images.")] = True
    save_images: Annotated[bool, Field(description="Ignored: every image is stored.")] = False
    force_task_id: Annotated[
        Annotated[str, AfterValidator(validation.check_printable)] | None,
        Field(max_length=100, description="The same id and request return the same job."),
    ] = None
    alwayson_scripts: Annotated[
        dict[str, Script | None],
        Field(description="LayerDiffuse, by its name, with positional arguments."),
    ] = {}  # noqa: RUF012 - pydantic copies it
    layerdiffuse_enabled: Annotated[
        bool, Field(description="Generate with transparency, also without the script.")
    ] = True
    restore_faces: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = False
    tiling: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = False
    styles: Annotated[
        list[str],
        Field(max_length=100, description="There are none: a warning names those that are sent."),
    ] = []  # noqa: RUF012 - pydantic copies it
    script_name: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = None
    refiner_checkpoint: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = None
    infotext: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = None
    seed_resize_from_w: Annotated[int, Field(description=NOT_IMPLEMENTED)] = -1
    seed_resize_from_h: Annotated[int, Field(description=NOT_IMPLEMENTED)] = -1
    s_churn: Annotated[float, Field(description=NOT_IMPLEMENTED)] = 0
    s_noise: Annotated[float, Field(description="1 is ignored; others are not implemented.")] = 1
    eta: Annotated[
        float | None,
        Field(description="Share of fresh noise in each step, from 0 to 1. DDIM: 0; others: 1."),
    ] = None
    s_min_uncond: Annotated[
        float | None,
        Field(description="Noise level below which every second step has no guidance."),
    ] = None
    disable_extra_networks: Annotated[
        bool, Field(description="Remove LoRA tags from the prompt without using them.")
    ] = False

    @model_validator(mode="before")
    @classmethod
    def check_unicode(cls, data: Any) -> Any:
        """Check the fields that can be anything and are returned to the client."""
        fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        for name in ECHOED.keys() & fields.keys():
            try:
                validation.check_unicode(fields[name])
            except ValueError as error:
                raise InvalidRequest(f"{error}.", field=name) from None
        return data

    @property
    def echo(self) -> dict[str, Any]:
        """Return the request as AUTOMATIC1111 repeats it in `parameters`."""
        fields = self.model_dump(mode="json", exclude={"override_settings"})
        sent = {name: fields.get(name, value) for name, value in self._sent.items()}
        own = {name: value for name, value in fields.items() if name not in ECHOED}
        return {**{name: sent.get(name, value) for name, value in ECHOED.items()}, **own}

    @property
    def input_images(self) -> dict[InputRole, str]:
        """Return the script's input images by role, as base64. Raises `InvalidRequest`."""
        script = self._script()
        return script.images if script and self.layerdiffuse_enabled else {}

    def model_source(self, stored: OverrideSettings) -> str:
        """Return the field that names the model."""
        if stored.sd_model_checkpoint and not self.override_settings.sd_model_checkpoint:
            return "options.sd_model_checkpoint"
        return FIELDS["model"]

    def to_spec(
        self, service: Service, stored: OverrideSettings, inputs: tuple[ImageInput, ...] = ()
    ) -> JobSpec:
        """Return the job of this request. Raises `InvalidRequest`.

        Args:
            service: The service that runs the job.
            stored: Settings of the client between requests.
            inputs: The stored `input_images`.
        """
        self._reject_unimplemented()
        reject_unused_options(self, "trim", "trim_threshold", "trim_padding")
        settings = self.override_settings.over(stored)
        sampler, scheduler = self._choose_sampler()
        second = self._second_pass()
        generation = GenerationRequest.of(
            self,
            comments=service.prompt_comments
            if settings.enable_prompt_comments is None
            else settings.enable_prompt_comments,
            sampler=sampler,
            scheduler=scheduler,
            clip_skip=settings.CLIP_stop_at_last_layers or 1,
            model=settings.sd_model_checkpoint or None,
            noise=settings.noise or service.noise,
            decode=service.decode,
            options=settings.options(
                sampler, OVERRIDE, self.eta, self.s_min_uncond, second.get("hires_sampler")
            ),
            warnings=self._warnings(),
            inputs=inputs,
            prompt=remove_tags(self.prompt) if self.disable_extra_networks else self.prompt,
            **self._layerdiffuse(),
            **second,
        )
        return JobSpec.model_construct(
            generation=generation,
            iterations=self.n_iter,
            output=copy_fields(self, Output),
            previews=bool(settings.live_previews_enable),
        )

    def _choose_sampler(self) -> tuple[str | None, str | None]:
        """Return the sampler and the schedule by their own names. Raises `InvalidRequest`."""
        name = self.sampler_name or self.sampler_index
        scheduler = self.scheduler or ""
        sent_as = "sampler_name" if self.sampler_name else "sampler_index"
        with wire_names({**FIELDS, "sampler": sent_as}):
            return choose_sampler(
                expand_aliases(name), SCHEDULES.get(scheduler.lower(), scheduler), AUTOMATIC
            )

    def _warnings(self) -> tuple[str, ...]:
        """Return what of the request has no effect."""
        styles = dict.fromkeys(style for style in self.styles if is_used(style))
        missing = tuple(f"There is no style {validation.shown(style)}." for style in styles)
        script = self._script()
        return missing + (script.warnings if script else ())

    def _script(self) -> Arguments | None:
        """Return the arguments of the script, if sent. Raises `InvalidRequest`."""
        sent = None
        for title, script in self.alwayson_scripts.items():
            if title.lower() == SCRIPT.lower():
                sent = script
            elif title.lower() not in FIELDS_AS_SCRIPTS and script and _is_enabled(script.args):
                raise InvalidRequest(
                    f'there is no script "{title}" here.',
                    hint=f"Use {SCRIPT}.",
                    field="alwayson_scripts",
                )
        if sent is None:
            return None
        arguments = read_arguments(sent.args)
        if (
            sent.args
            and arguments.enabled != self.layerdiffuse_enabled
            and "layerdiffuse_enabled" in self.model_fields_set
        ):
            raise InvalidRequest(
                f"it is {str(self.layerdiffuse_enabled).lower()}, "
                f"and the script {SCRIPT} has the opposite.",
                hint="Send one of the two.",
                field="layerdiffuse_enabled",
            )
        return arguments

    def _layerdiffuse(self) -> dict[str, Any]:
        """Return the fields of LayerDiffuse. Raises `InvalidRequest`."""
        script = self._script()
        if not self.layerdiffuse_enabled:
            return {"mode": OPAQUE}
        return script.fields if script else {}

    def _second_pass(self) -> dict[str, Any]:
        """Return the fields of the second pass. Raises `InvalidRequest`."""
        if not is_used(self.enable_hr):
            return {}
        sampler = self.sampler_name or self.sampler_index
        size = (self.width, self.height)
        fields = self.second_pass(size, sampler, self.scheduler)
        if self.disable_extra_networks:
            fields["hires_prompt"] = remove_tags(fields["hires_prompt"])
        return fields

    def _reject_unimplemented(self) -> None:
        names = [
            "restore_faces",
            "tiling",
            "script_name",
            "refiner_checkpoint",
            "infotext",
            "s_churn",
        ]
        used = [name for name in names if is_used(getattr(self, name))]
        used += [
            name for name in ("seed_resize_from_w", "seed_resize_from_h") if getattr(self, name) > 0
        ]
        used += ["s_noise"] if self.s_noise != 1 else []
        self.override_settings.reject_unimplemented(OVERRIDE)
        if used:
            raise InvalidRequest("this is not implemented.", hint="Leave it out.", field=used[0])


def _is_enabled(args: list[Any]) -> bool:
    """Return whether a script is switched on by its arguments.

    The first one of most scripts is a switch. Those of ControlNet are objects with a switch each.
    ADetailer has both.
    """
    units = [cast("dict[str, Any]", unit) for unit in args if isinstance(unit, dict)]
    if not units:
        return bool(args) and is_used(args[0])
    is_on = args[0] is None or isinstance(args[0], dict) or is_used(args[0])
    return is_on and any(all(is_used(unit.get(key, True)) for key in SWITCHES) for unit in units)


class Detail(BaseModel):
    """An error."""

    detail: Annotated[str, Field(description="What happened, and what to do.")]


class Txt2ImgResponse(BaseModel):
    """The images as bare base64, the request, and `info`, a JSON string."""

    images: Annotated[list[str], Field(description="PNG files as base64.")]
    parameters: Annotated[dict[str, Any], Field(description="The request.")]
    info: Annotated[
        str, Field(description="JSON string: seeds, size, sampler, model and infotexts.")
    ]


def file_title(entry: ModelEntry) -> str:
    """Return the title of a model in AUTOMATIC1111, with the suffix of its file."""
    suffix = entry.path.suffix if entry.kind == "single_file" else ""
    if entry.name.endswith(suffix):
        suffix = ""  # of a name that needs it to differ from others
    return f"{entry.name}{suffix}{entry.title.removeprefix(entry.name)}"


class SdModel(BaseModel):
    """One checkpoint."""

    title: Annotated[
        str, Field(description="Name of the file, with the short hash once it is known.")
    ]
    model_name: Annotated[str, Field(description="Name.")]
    hash: Annotated[str | None, Field(description="First ten digits of the SHA-256.")]
    sha256: Annotated[str | None, Field(description="Null until the file was hashed.")]
    filename: Annotated[str, Field(description="Path of the file from the models folder on.")]
    config: Annotated[str | None, Field(description="Always null.")]

    @classmethod
    def of(cls, entry: ModelEntry, models_dir: Path) -> SdModel:
        """Return the row of a model."""
        folder = EMBEDDED_MODEL.parent if entry.path == EMBEDDED_MODEL else models_dir
        return cls(
            title=file_title(entry),
            model_name=entry.name,
            hash=entry.short_hash,
            sha256=entry.sha256,
            filename=public_path(entry.path, folder),
            config=None,
        )


class ImageFile(BaseModel):
    """An image file as base64, with or without the head of a data URL."""

    carries_images: ClassVar[bool] = True

    image: Annotated[str, Field(description="The file.")]
