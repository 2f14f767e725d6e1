"""Bodies and responses of the AUTOMATIC1111 dialect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, field_validator

from alphalayer.api.a1111.lists import ALIASES
from alphalayer.api.a1111.script import SCRIPT, Arguments, read_arguments
from alphalayer.api.deps import Service, wire_names
from alphalayer.api.schemas import Body, reject_unused_options
from alphalayer.catalog import EMBEDDED_MODEL, ModelEntry, public_path
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import Iterations, JobSpec, Output, Postprocessing
from alphalayer.core.modes import OPAQUE, InputRole
from alphalayer.core.request import (
    AUTOMATIC,
    BatchSize,
    CfgScale,
    ClipSkip,
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
    choose_sampler,
    copy_fields,
)

FIELDS = {
    "sampler": "sampler_name",
    "model": "override_settings.sd_model_checkpoint",
    "iterations": "n_iter",
    "loras": "prompt",
    "mode": f"alwayson_scripts.{SCRIPT}.args",
    "inputs": f"alwayson_scripts.{SCRIPT}.args",
}
"""Names of fields on the wire, where they differ from those of `JobSpec`."""
NOT_IMPLEMENTED = "Not implemented; refused if it would change the image."


@dataclass(frozen=True)
class Options:
    """Settings of this dialect between requests, of one client."""

    sd_model_checkpoint: str | None = None
    clip_skip: int = 1
    previews: bool = False


class OverrideSettings(BaseModel):
    """Settings for one request. Other settings of AUTOMATIC1111 are ignored."""

    sd_model_checkpoint: Annotated[
        str | None, Field(max_length=500, description="Model name, title or hash.")
    ] = None
    sd_vae: Annotated[
        str | None, Field(description='Only "Automatic"; others are not implemented.')
    ] = None
    CLIP_stop_at_last_layers: ClipSkip | None = None
    live_previews_enable: Annotated[
        StrictBool | None, Field(description="Whether `progress` has an image.")
    ] = None
    forge_additional_modules: Annotated[Any, Field(description="Not implemented.")] = None

    def reject_unimplemented(self, prefix: str = "") -> None:
        """Raise `InvalidRequest` for a setting that is not implemented.

        Args:
            prefix: Put before the name of the field in the error.
        """
        other_vae = self.sd_vae not in (None, "", "None", "Automatic")
        if other_vae or self.forge_additional_modules:
            name = "sd_vae" if other_vae else "forge_additional_modules"
            raise _not_implemented(f"{prefix}{name}")


class Script(BaseModel):
    """Arguments of one script."""

    args: Annotated[
        list[Any],
        Field(description="In the order of `script-info`. A missing tail keeps its defaults."),
    ] = []


class Txt2ImgRequest(Body, Postprocessing, frozen=True):
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
        dict[str, Script],
        Field(description="LayerDiffuse, by its name, with positional arguments."),
    ] = {}  # noqa: RUF012 - pydantic copies it
    layerdiffuse_enabled: Annotated[
        bool, Field(description="Generate with transparency, also without the script.")
    ] = True
    enable_hr: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = False
    restore_faces: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = False
    tiling: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = False
    styles: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = ()
    script_name: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = None
    refiner_checkpoint: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = None
    infotext: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = None
    seed_resize_from_w: Annotated[int, Field(description=NOT_IMPLEMENTED)] = -1
    seed_resize_from_h: Annotated[int, Field(description=NOT_IMPLEMENTED)] = -1
    s_churn: Annotated[float, Field(description=NOT_IMPLEMENTED)] = 0
    s_noise: Annotated[float, Field(description="1 is ignored; others are not implemented.")] = 1
    eta: Annotated[float | None, Field(description="0 and 1 are ignored.")] = None

    @field_validator("alwayson_scripts", mode="before")
    @classmethod
    def _check_unicode(cls, scripts: Any) -> Any:
        # the arguments can be anything, and are returned to the client
        validation.check_unicode(scripts)
        return scripts

    @property
    def input_images(self) -> dict[InputRole, str]:
        """Return the script's input images by role, as base64. Raises `InvalidRequest`."""
        script = self._script()
        return script.images if script and self.layerdiffuse_enabled else {}

    def to_spec(
        self, service: Service, options: Options, inputs: tuple[ImageInput, ...] = ()
    ) -> JobSpec:
        """Return the job of this request. Raises `InvalidRequest`.

        `inputs` are the stored `input_images`.
        """
        self._reject_unimplemented()
        reject_unused_options(self, "trim", "trim_threshold", "trim_padding")
        override = self.override_settings
        name = self.sampler_name or self.sampler_index
        sent_as = "sampler_name" if self.sampler_name else "sampler_index"
        with wire_names({**FIELDS, "sampler": sent_as}):
            sampler, scheduler = choose_sampler(
                ALIASES.get(name.lower(), name), self.scheduler or AUTOMATIC
            )
        generation = GenerationRequest.of(
            self,
            comments=service.prompt_comments,
            sampler=sampler,
            scheduler=scheduler,
            clip_skip=override.CLIP_stop_at_last_layers or options.clip_skip,
            model=override.sd_model_checkpoint or options.sd_model_checkpoint,
            noise=service.noise,
            decode=service.decode,
            inputs=inputs,
            **self._layerdiffuse(),
        )
        previews = override.live_previews_enable
        return JobSpec.model_construct(
            generation=generation,
            iterations=self.n_iter,
            output=copy_fields(self, Output),
            previews=options.previews if previews is None else previews,
        )

    def _script(self) -> Arguments | None:
        """Return the arguments of the script, if sent. Raises `InvalidRequest`."""
        for title, script in self.alwayson_scripts.items():
            if title.lower() != SCRIPT.lower():
                raise InvalidRequest(
                    f'there is no script "{title}" here.',
                    hint=f"Use {SCRIPT}.",
                    field="alwayson_scripts",
                )
            arguments = read_arguments(script.args)
            if (
                script.args
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
        return None

    def _layerdiffuse(self) -> dict[str, Any]:
        """Return the fields of LayerDiffuse. Raises `InvalidRequest`."""
        script = self._script()
        if not self.layerdiffuse_enabled:
            return {"mode": OPAQUE}
        return script.fields if script else {}

    def _reject_unimplemented(self) -> None:
        names = [
            "enable_hr",
            "restore_faces",
            "tiling",
            "styles",
            "script_name",
            "refiner_checkpoint",
            "infotext",
            "s_churn",
        ]
        used = [name for name in names if getattr(self, name)]
        used += [
            name for name in ("seed_resize_from_w", "seed_resize_from_h") if getattr(self, name) > 0
        ]
        used += ["s_noise"] if self.s_noise != 1 else []
        used += ["eta"] if self.eta not in (None, 0, 1) else []
        self.override_settings.reject_unimplemented("override_settings.")
        if used:
            raise _not_implemented(used[0])


def _not_implemented(field: str) -> InvalidRequest:
    return InvalidRequest("this is not implemented.", hint="Leave it out.", field=field)


class Detail(BaseModel):
    """An error."""

    detail: Annotated[str, Field(description="What happened, and what to do.")]


class Txt2ImgResponse(BaseModel):
    """The images as bare base64, the parsed request, and `info`, a JSON string."""

    images: Annotated[list[str], Field(description="PNG files as base64.")]
    parameters: Annotated[dict[str, Any], Field(description="The parsed request.")]
    info: Annotated[
        str, Field(description="JSON string: seeds, size, sampler, model and infotexts.")
    ]


class SdModel(BaseModel):
    """One checkpoint."""

    title: Annotated[str, Field(description="Name, with the short hash once it is known.")]
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
            title=entry.title,
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
