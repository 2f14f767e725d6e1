"""Settings from flags, the environment (`ALPHALAYER_*`) and `alphalayer.toml`, in that order.

Only the command, the composition root and process entries read them.
All other code receives plain values.
"""

from __future__ import annotations

import os
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from alphalayer.core import validation
from alphalayer.core.errors import STARTED_BY, SetupFailed
from alphalayer.core.request import MAX_SIDE, MIN_SIDE, DecodeMode, NoiseSource

PREFIX = "ALPHALAYER_"
TOML_FILE = "alphalayer.toml"
API_KEY = f"{PREFIX}API_KEY"
"""Name of the variable with the API key that `alphalayer mcp` sends to the service."""


def _matching(pattern: str, accepted: str, *, is_list: bool = False) -> AfterValidator:
    """Return a validator that matches a text against a pattern.

    Args:
        pattern: Regular expression for the whole text.
        accepted: Description of accepted values, for the error message.
        is_list: Split the text at commas and match each part.

    The error message does not repeat the value of a secret.
    """

    def check(value: Any) -> Any:
        text = (value.get_secret_value() if isinstance(value, SecretStr) else value) or ""
        for part in _split_list(text) if is_list else filter(None, [text.strip()]):
            if not re.fullmatch(pattern, part):
                shown = "" if isinstance(value, SecretStr) else f'"{part}" is not accepted; '
                raise ValueError(f"{shown}use {accepted}")
        return value

    return AfterValidator(check)


def _split_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_networks(value: str) -> str:
    for part in _split_list(value):
        try:
            ip_network(part if part != "*" else "::", strict=False)
        except ValueError:
            raise ValueError(
                f'"{part}" is not an address; use IP addresses, networks such as 10.0.0.0/8, or *'
            ) from None
    return value


_HTTP = r"https?://[^/\s]+"


OPTIONAL_TEXT = ("allowed_hosts", "cors_allow_origins", "trusted_proxies", "warm_up_sizes")
"""Settings whose empty text means none."""


class Settings(BaseSettings):
    """All settings. The description of a field is its documentation."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, toml_file=TOML_FILE, frozen=True, extra="forbid"
    )

    host: Annotated[str, Field(description="Address to listen on. All addresses: 0.0.0.0.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=1, le=65535, description="Port to listen on.")] = 7861
    models_dir: Annotated[
        Path, Field(description="Folder with Stable-diffusion/, layer_model/ and Lora/.")
    ] = Path("models")
    embeddings_dir: Annotated[
        Path | None,
        Field(
            description="Folder with textual-inversion embeddings. "
            "Default: embeddings, beside models_dir."
        ),
    ] = None
    outputs_dir: Annotated[Path, Field(description="Folder for generated images.")] = Path(
        "outputs"
    )
    data_dir: Annotated[Path, Field(description="Folder of the job journal.")] = Path("data")
    database: Annotated[
        SecretStr | None,
        Field(
            description="Database of a queue that many machines share: "
            "postgresql://user:password@host/name. Default: a file in data_dir."
        ),
        _matching(
            r"postgres(ql)?://.*",
            "the address of a PostgreSQL database, postgresql://user:password@host/name",
        ),
    ] = None
    storage: Annotated[
        str | None,
        Field(
            description="Bucket for images that many machines share: s3://bucket/prefix. "
            "Default: outputs_dir."
        ),
        _matching(r"(s3|gs|az)://[^/\s].*", "s3://bucket/prefix"),
    ] = None
    redirect_files: Annotated[
        bool,
        Field(
            description="Redirect image downloads to a signed URL of the bucket, "
            "instead of sending the bytes."
        ),
    ] = False
    sign_file_urls: Annotated[
        SecretStr | None,
        Field(
            description="Secret that signs the URLs of images, of 16 characters or more; the same "
            "on all machines. Without it, the name of an image is enough to download it."
        ),
        _matching(r".{16,}", "16 characters or more, such as the output of openssl rand -hex 32"),
    ] = None
    signed_url_s: Annotated[
        int,
        Field(
            ge=60,
            le=31_536_000,
            description="Seconds that a signed URL is valid, at least; at most twice as long.",
        ),
    ] = 86_400
    role: Annotated[
        Literal["all", "api", "worker"],
        Field(
            description="With a shared queue: answer requests (api), generate images (worker), "
            "or both (all)."
        ),
    ] = "all"
    default_model: Annotated[
        str | None,
        Field(description="Model of requests that name none. Default: the first model."),
    ] = None
    public_url: Annotated[
        str | None,
        Field(description="Base of the URLs in responses, as clients reach the service."),
        _matching(
            _HTTP + r"\S*", "http:// or https:// and a host, such as https://images.example.com"
        ),
    ] = None
    allowed_hosts: Annotated[
        str,
        Field(
            description="Comma-separated host names that clients use besides localhost, the "
            "machine's own name, IP addresses and the host of public_url, such as "
            'pics.example.com, or "*". Without keys, other names are refused.'
        ),
        _matching(
            r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*",
            'names without a port, such as pics.example.com or *.example.com, or "*"',
            is_list=True,
        ),
    ] = ""
    trusted_proxies: Annotated[
        str,
        Field(description="Comma-separated addresses whose X-Forwarded-* headers are trusted."),
        AfterValidator(_check_networks),
    ] = "127.0.0.1"
    cors_allow_origins: Annotated[
        str,
        Field(
            description="Comma-separated origins of web pages and apps that may use the service "
            'from a browser (CORS), or "*". Empty: off.'
        ),
        _matching(
            r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]*",
            'origins such as https://example.com, without a path, or "*"',
            is_list=True,
        ),
    ] = ""
    api_auth: Annotated[
        SecretStr | None,
        Field(description="Comma-separated user:password pairs for HTTP Basic."),
        _matching(
            r"[A-Za-z0-9_.@-]{1,100}:.*",
            "comma-separated user:password pairs; users of ASCII letters, digits and _.@-",
            is_list=True,
        ),
    ] = None
    keys_file: Annotated[
        Path,
        Field(
            description="File of hashed API keys, created by `alphalayer keys add`. "
            "While the file exists, requests need a key."
        ),
    ] = Path("data/keys.json")
    device: Annotated[str, Field(description="auto, cuda, cuda:0, mps or cpu.")] = "auto"
    dtype: Annotated[
        Literal["auto", "fp16", "bf16", "fp32"],
        Field(description="Number format of UNet and decoder."),
    ] = "auto"
    memory: Annotated[
        Literal["auto", "high", "balanced", "low"],
        Field(description="GPU memory mode: high from 16 GB on, balanced from 10 GB, low below."),
    ] = "auto"
    acceleration: Annotated[
        Literal["off", "graphs", "compile"],
        Field(
            description="How a CUDA GPU runs the UNet: off, graphs (recorded for each image size) "
            "or compile (graphs of kernels of torch.compile)."
        ),
    ] = "off"
    warm_up_sizes: Annotated[
        str,
        Field(
            pattern=r"^(\d+x\d+(,\d+x\d+)*)?$",
            description="Sizes of the images that an engine generates before it is ready, such as "
            "1024x1024,832x1216. Default: one image.",
        ),
    ] = ""
    noise: Annotated[
        NoiseSource,
        Field(description="Noise source of requests that name none; nv is the same everywhere."),
    ] = "nv"
    decode: Annotated[
        DecodeMode,
        Field(
            description="Transparent decode: official, forge2 as Forge 2 does it, or auto: forge2 "
            "for checkpoints, official for the embedded model. launch.py starts with auto."
        ),
    ] = "official"
    prompt_comments: Annotated[
        bool, Field(description='Remove comments from prompts: "#" to the end of the line.')
    ] = True
    batch_pixels: Annotated[
        int | None,
        Field(
            ge=0,
            description="Most pixels generated together, over several jobs. 0: each job alone. "
            "Default: what fits into GPU memory.",
        ),
    ] = None
    batch_wait_s: Annotated[
        float,
        Field(ge=0, le=10, description="Seconds that an incomplete batch waits for more jobs."),
    ] = 0.02
    spare_model_gb: Annotated[
        float,
        Field(
            ge=0,
            description="Host memory (GB) for models that are not in use. "
            "Switching back to one then needs no disk.",
        ),
    ] = 0.0
    unload_model_after_s: Annotated[
        float,
        Field(
            ge=0,
            le=1_000_000,
            description="Seconds without a job after which the memory of the model is released, "
            "at least 1. The next job reads it again. 0: never.",
        ),
    ] = 0.0
    queue_limit: Annotated[
        int, Field(ge=1, le=100_000, description="Most waiting jobs. More are refused with 429.")
    ] = 200
    silence_limit_s: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds without a message after which a starting or running engine "
            "process counts as hung. Steps of a known pace have a lower limit.",
        ),
    ] = 900.0
    webhook_secret: Annotated[
        SecretStr | None,
        Field(
            description="Secret that signs webhooks. Without it, jobs with a webhook_url are "
            "refused."
        ),
    ] = None
    webhook_allow_private: Annotated[
        bool, Field(description="Also send webhooks to private networks and to this machine.")
    ] = False
    keep_pictures_days: Annotated[
        float, Field(ge=0, description="Days after which images are removed. 0: never.")
    ] = 0.0
    keep_pictures_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Total size of images above which the oldest are removed. 0: never.",
        ),
    ] = 0
    keep_jobs_days: Annotated[
        float, Field(ge=0, description="Days after which finished jobs are removed. 0: never.")
    ] = 30.0
    drain_s: Annotated[
        int,
        Field(
            ge=0,
            description="Seconds that running requests may take to finish during shutdown.",
        ),
    ] = 60
    max_request_pixels: Annotated[
        int,
        Field(
            ge=0,
            description="Most pixels of all images of one request. An omitted side counts as "
            "1024. More are refused with 422. 0: no limit.",
        ),
    ] = 0
    max_request_cost: Annotated[
        float,
        Field(
            ge=0,
            description="Highest cost of one request in megapixel-steps. An image of 1024x1024 "
            "with 20 steps costs 30, which takes about 1.2 seconds on an H200 [estimated] and 33 "
            "on a CPU core with the embedded model. More is refused with 422. 0: no limit.",
        ),
    ] = 10_000
    max_request_bytes: Annotated[
        int,
        Field(
            ge=1024,
            description="Largest request body in bytes. Bodies without images: at most 1,000,000.",
        ),
    ] = 64_000_000
    image_memory_bytes: Annotated[
        int | None,
        Field(
            ge=1,
            description="Memory for all images that are converted or uploaded at one time. "
            "A larger image is processed alone. "
            "Default: a quarter of the container's memory, at most 250 MB.",
        ),
    ] = None
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            description="Most open connections. Over it, only health checks are answered. The "
            "system's limit of open files counts, too.",
        ),
    ] = 2000
    upload_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            description="Longest pause of a request's body in seconds. Less than 4 kB/s counts as "
            "a part of a pause.",
        ),
    ] = 120.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Lowest level of log lines."),
    ] = "info"
    log_prompts: Annotated[bool, Field(description="Log prompts.")] = False
    tracing: Annotated[
        bool,
        Field(
            description="Send traces over OTLP to the address in OpenTelemetry's OTEL_* variables."
        ),
    ] = False
    log_json: Annotated[
        bool, Field(description="Log one JSON object a line instead of readable text.")
    ] = False

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "" and info.field_name not in OPTIONAL_TEXT:
            raise ValueError("it is empty; give a value, or remove the setting")
        return value

    @field_validator("warm_up_sizes")
    @classmethod
    def _sizes_of_images(cls, value: str) -> str:
        for size in filter(None, value.split(",")):
            if not all(MIN_SIDE <= int(side) <= MAX_SIDE for side in size.split("x")):
                raise ValueError(f"{size}: a side has from {MIN_SIDE} to {MAX_SIDE} pixels")
        return value

    @field_validator("unload_model_after_s")
    @classmethod
    def _whole_second(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("expected 0, or at least 1")
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources: flags, then the environment, then the TOML file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @field_validator("role")
    @classmethod
    def _check_shared_queue(cls, value: str, info: ValidationInfo) -> str:
        if value != "all" and not info.data.get("database", True):
            raise ValueError(f'"{value}" needs a shared database; set database')
        return value

    @property
    def allowed_names(self) -> list[str]:
        """Return the names of `allowed_hosts`."""
        return _split_list(self.allowed_hosts)

    @property
    def allowed_origins(self) -> list[str]:
        """Return the origins of `cors_allow_origins`."""
        return _split_list(self.cors_allow_origins)

    @property
    def image_location(self) -> str:
        """Return the path of the folder, or the URL of the bucket, for images."""
        return self.storage or str(self.outputs_dir)

    @property
    def embeddings(self) -> Path:
        """Return the folder of embeddings."""
        return self.embeddings_dir or self.models_dir.parent / "embeddings"

    def check_folders(self) -> None:
        """Check that the folder of images holds no settings, models or data.

        Raises:
            SetupFailed: It is the folder of one of them, or one above.
        """
        if self.storage:
            return
        images = self.outputs_dir.resolve()
        others = {
            TOML_FILE: Path(TOML_FILE),
            "data_dir": self.data_dir,
            "keys_file": self.keys_file,
            "models_dir": self.models_dir,
            "embeddings_dir": self.embeddings,
        }
        for name, path in others.items():
            if path.resolve().is_relative_to(images):
                raise SetupFailed(
                    f"outputs_dir: the folder of images {images} also holds {name} ({path}).",
                    hint="Set outputs_dir to a folder for images alone.",
                )

    def engine_options(self) -> dict[str, Any]:
        """Return the options of the engine process, as plain JSON values."""
        return {
            "models_dir": str(self.models_dir),
            "embeddings_dir": str(self.embeddings),
            "device": self.device,
            "dtype": self.dtype,
            "memory": self.memory,
            "default_model": self.default_model,
            "batch_pixels": self.batch_pixels,
            "spare_model_bytes": int(self.spare_model_gb * 1e9),
            "unload_after_s": self.unload_model_after_s,
            "acceleration": self.acceleration,
            "compile_cache": str(self.data_dir / "compiled"),
            "warm_up_sizes": [
                tuple(map(int, size.split("x"))) for size in self.warm_up_sizes.split(",") if size
            ],
        }


def load_settings(**flags: Any) -> Settings:
    """Read the settings. Flags that are None do not count.

    Raises:
        SetupFailed: A name is unknown or a value is not accepted.
            The message names the flag, the variable, or the line of the TOML file.
    """
    variables = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {
        f"{PREFIX}TORCH",
        STARTED_BY,
        API_KEY,
    }
    unknown = sorted(
        name for name in os.environ if name.startswith(PREFIX) and name not in variables
    )
    if unknown:
        raise SetupFailed(f"unknown setting in the environment: {', '.join(unknown)}.", hint=_LIST)
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        field = Settings.model_fields.get(name)
        if field and field.annotation == SecretStr | None:
            first["input"] = "…"  # the value may be a password in the wrong form
        raise SetupFailed(
            f"{_source_of(name, flags)}: {validation.describe_validation_error(first)}.",
            hint=_LIST,
        ) from None
    except (OSError, ValueError) as error:
        raise SetupFailed(f"{TOML_FILE} cannot be read: {error}.", hint=_LIST) from None


def flag_of(name: str) -> str:
    """Return the flag of a setting or field."""
    return "--" + name.replace("_", "-")


def _source_of(name: str, flags: dict[str, Any]) -> str:
    if flags.get(name) is not None:
        return flag_of(name)
    variable = f"{PREFIX}{name.upper()}"
    return variable if os.environ.get(variable) else f"{TOML_FILE}, {name}"


_LIST = "All settings are in docs/reference/settings.md."
