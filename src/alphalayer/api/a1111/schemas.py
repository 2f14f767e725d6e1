"""Bodies and responses of the AUTOMATIC1111 dialect."""

from __future__ import annotations

from abc import abstractmethod
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

from alphalayer.api.a1111.echo import IMAGES, TXT2IMG
from alphalayer.api.a1111.hires import HIRES_FIELDS, HiresBody
from alphalayer.api.a1111.lists import SCHEDULES, expand_aliases
from alphalayer.api.a1111.script import (
    ARGUMENTS,
    IMAGE_ARGUMENTS,
    SCRIPT,
    Arguments,
    read_arguments,
    replace_texts,
)
from alphalayer.api.a1111.settings import OverrideSettings, is_used
from alphalayer.api.deps import Service, wire_names
from alphalayer.api.schemas import Body, reject_unused_options
from alphalayer.api.uploads import Images, StoredInput, Upload
from alphalayer.catalog import EMBEDDED_MODEL, ModelEntry, public_path
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.inputs import check_transparency
from alphalayer.core.job import Iterations, JobSpec, Output, Postprocessing
from alphalayer.core.modes import DEFAULT_MODE, MODES, OPAQUE, InputRole
from alphalayer.core.prompts import remove_tags
from alphalayer.core.request import (
    BatchSize,
    CfgScale,
    GenerationRequest,
    Height,
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
    "mode": ARGUMENTS,
    "inputs": ARGUMENTS,
    "init": "init_images",
    **{role: f"{ARGUMENTS}.{name}" for role, name in IMAGE_ARGUMENTS.items()},
}
"""Names of fields on the wire, where they differ from those of `JobSpec`."""
NOT_IMPLEMENTED = "Not implemented; refused if it would change the image."
OVERRIDE = "override_settings."
FIELDS_AS_SCRIPTS = ("sampler", "seed")
"""Scripts of AUTOMATIC1111's page whose values are fields of the body."""
SWITCHES = ("enabled", "ad_tab_enable", "ad_model")
"""Keys that switch a unit of ControlNet or ADetailer off. Without them it is on."""


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


class GenerationBody(Body, Postprocessing, frozen=True):
    """Fields that `txt2img` and `img2img` share, with the defaults of AUTOMATIC1111.

    Unknown fields are ignored, as AUTOMATIC1111 does. The fields of postprocessing are extensions.
    """

    model_config = ConfigDict(extra="ignore")

    carries_images: ClassVar[bool] = True
    echoed: ClassVar[dict[str, Any]]
    """Fields that `parameters` repeats, with their defaults."""

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
        bool | None, Field(description="Generate with transparency, also without the script.")
    ] = None
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
        for name in cls.echoed.keys() & fields.keys() - {*IMAGES}:
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
        own = {name: value for name, value in fields.items() if name not in self.echoed}
        echo = {**{name: sent.get(name, value) for name, value in self.echoed.items()}, **own}
        if images := self._script_images:
            hidden = dict.fromkeys(images.values())
            echo["alwayson_scripts"] = replace_texts(echo["alwayson_scripts"], hidden)
        return echo

    def uploads(
        self,
        stored: OverrideSettings,  # noqa: ARG002 - that of img2img reads it
    ) -> list[Upload]:
        """Return the images of the request.

        Args:
            stored: Settings of the client between requests.

        Raises:
            InvalidRequest: The script is not valid.
        """
        return [Upload(role, FIELDS[role], image) for role, image in self._script_images.items()]

    @property
    def _script_images(self) -> dict[InputRole, str]:
        script = self._script()
        return script.images if script and self.layerdiffuse_enabled is not False else {}

    def digests(self, images: Images) -> dict[str, Any]:
        """Return the digests of images by the field that they are in."""
        digests = {
            source: images[role].content_digest for role, source in self._script_images.items()
        }
        if not digests:
            return {}
        return {"alwayson_scripts": replace_texts(self._sent["alwayson_scripts"], digests)}

    def model_source(self, stored: OverrideSettings) -> str:
        """Return the field that names the model."""
        if stored.sd_model_checkpoint and not self.override_settings.sd_model_checkpoint:
            return "options.sd_model_checkpoint"
        return FIELDS["model"]

    def to_spec(
        self, service: Service, stored: OverrideSettings, images: Images | None = None
    ) -> JobSpec:
        """Return the job of this request. Raises `InvalidRequest`.

        Args:
            service: The service that runs the job.
            stored: Settings of the client between requests.
            images: The stored images of the request.
        """
        self._reject_unimplemented()
        reject_unused_options(self, "trim", "trim_threshold", "trim_padding")
        settings = self.override_settings.over(stored)
        sampler, scheduler = self._choose_sampler()
        own_fields, images = self._own_fields(settings), images or {}
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
                sampler, OVERRIDE, self.eta, self.s_min_uncond, own_fields.get("hires_sampler")
            ),
            warnings=self._warnings(),
            inputs=tuple(image.as_role(role) for role, image in images.items()),
            prompt=remove_tags(self.prompt) if self.disable_extra_networks else self.prompt,
            **{**own_fields, **self._layerdiffuse(images.get("init"))},
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

    def _layerdiffuse(self, init: StoredInput | None) -> dict[str, Any]:
        """Return the fields of LayerDiffuse. Raises `InvalidRequest`."""
        script = self._script()
        if self.layerdiffuse_enabled is False:
            return {"mode": OPAQUE}
        is_opaque = init is not None and init.is_opaque
        if script is None and self.layerdiffuse_enabled is None:
            return {"mode": OPAQUE if is_opaque else DEFAULT_MODE}
        fields = script.fields if script else {}
        if is_opaque:
            mode = MODES[fields.get("mode", DEFAULT_MODE)]
            check_transparency(mode, "switch LayerDiffuse off")
        return fields

    @abstractmethod
    def _own_fields(self, settings: OverrideSettings) -> dict[str, Any]:
        """Return the fields of `GenerationRequest` that this kind of request alone has.

        Those of LayerDiffuse precede them.

        Args:
            settings: Settings of the request and the client.

        Raises:
            InvalidRequest: A field is wrong or not implemented.
        """
        ...

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


class Txt2ImgRequest(HiresBody, GenerationBody, frozen=True):
    """Body of `POST /sdapi/v1/txt2img`. It generates with transparency by default."""

    model_config = ConfigDict(
        title="A1111Txt2ImgRequest",
        json_schema_extra={
            "examples": [
                {"prompt": "an apple, high quality", "steps": 20, "width": 1024, "height": 1024}
            ]
        },
    )
    echoed: ClassVar[dict[str, Any]] = TXT2IMG

    layerdiffuse_enabled: Annotated[
        bool, Field(description="Generate with transparency, also without the script.")
    ] = True

    def _own_fields(
        self,
        settings: OverrideSettings,  # noqa: ARG002 - that of img2img reads it
    ) -> dict[str, Any]:
        """Return the fields of the second pass. Raises `InvalidRequest`."""
        if not is_used(self.enable_hr):
            return {}
        sampler = self.sampler_name or self.sampler_index
        size = (self.width, self.height)
        fields = self.second_pass(size, sampler, self.scheduler)
        if self.disable_extra_networks:
            fields["hires_prompt"] = remove_tags(fields["hires_prompt"])
        return fields


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


class GenerationResponse(BaseModel):
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
