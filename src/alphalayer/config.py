"""Settings: from flags, the environment (`ALPHALAYER_*`) and `alphalayer.toml`, in that order; frozen; wrong ones fail loudly.

Read by the command, the composition root and process entries only; everything else is handed plain values.
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
from alphalayer.core.errors import SetupFailed
from alphalayer.core.request import DecodeMode, NoiseSource

PREFIX = "ALPHALAYER_"
TOML_FILE = "alphalayer.toml"
STARTED_BY = f"{PREFIX}STARTED_BY"
"""Set by run.py to the words that start this program, for hints."""
API_KEY = f"{PREFIX}API_KEY"
"""The key that `alphalayer mcp` shows to the service."""


def _matching(pattern: str, accepted: str, *, is_list: bool = False) -> AfterValidator:
    """A check of a text, or of each part of a comma-separated list; `accepted` says what may stand there. Secrets are not repeated."""

    def check(value: Any) -> Any:
        text = (value.get_secret_value() if isinstance(value, SecretStr) else value) or ""
        for part in filter(
            None, (each.strip() for each in (text.split(",") if is_list else [text]))
        ):
            if not re.fullmatch(pattern, part):
                shown = "" if isinstance(value, SecretStr) else f'"{part}" is not accepted; '
                raise ValueError(f"{shown}use {accepted}")
        return value

    return AfterValidator(check)


def _check_networks(value: str) -> str:
    for part in filter(None, (each.strip() for each in value.split(","))):
        try:
            ip_network(part if part != "*" else "::", strict=False)
        except ValueError:
            raise ValueError(
                f'"{part}" is no address; use IP addresses, networks such as 10.0.0.0/8, or *'
            ) from None
    return value


_HTTP = r"https?://[^/\s]+"


class Settings(BaseSettings):
    """Everything that can be set. Each field's description is its documentation."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, toml_file=TOML_FILE, frozen=True, extra="forbid"
    )

    host: Annotated[str, Field(description="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535, description="Port to listen on.")] = 7861
    models_dir: Annotated[
        Path, Field(description="Folder with Stable-diffusion/, layer_model/ and Lora/.")
    ] = Path("models")
    embeddings_dir: Annotated[
        Path | None,
        Field(
            description="Folder with textual-inversion embeddings; unset: embeddings, beside models_dir."
        ),
    ] = None
    outputs_dir: Annotated[Path, Field(description="Folder that pictures are written to.")] = Path(
        "outputs"
    )
    data_dir: Annotated[Path, Field(description="Folder of the journal of jobs.")] = Path("data")
    database: Annotated[
        SecretStr | None,
        Field(
            description="postgresql://user:password@host/name of a queue that many machines share; else a file in data_dir."
        ),
        _matching(
            r"postgres(ql)?://.*",
            "the address of a PostgreSQL database, postgresql://user:password@host/name",
        ),
    ] = None
    storage: Annotated[
        str | None,
        Field(
            description="s3://bucket/prefix for pictures that many machines share; else outputs_dir."
        ),
        _matching(r"(s3|gs|az)://[^/\s].*", "s3://bucket/prefix"),
    ] = None
    redirect_files: Annotated[
        bool,
        Field(
            description="Send those who want a picture to a signed URL of the bucket, instead of its bytes."
        ),
    ] = False
    role: Annotated[
        Literal["all", "api", "worker"],
        Field(description="With a shared queue: answer requests (api), draw (worker), or both."),
    ] = "all"
    default_model: Annotated[
        str | None, Field(description="Model of requests that name none; else the first one.")
    ] = None
    public_url: Annotated[
        str | None,
        Field(description="Base of the URLs handed out, as clients reach the service."),
        _matching(_HTTP + r"\S*", "http:// or https:// and a host, https://pics.example.com say"),
    ] = None
    trusted_proxies: Annotated[
        str,
        Field(description="Comma-separated addresses whose X-Forwarded-* headers are believed."),
        AfterValidator(_check_networks),
    ] = "127.0.0.1"
    cors_allow_origins: Annotated[
        str,
        Field(description='Comma-separated origins for CORS, or "*"; empty: off.'),
        _matching(
            rf"\*|{_HTTP}",
            'origins such as https://example.com, without a path, or "*"',
            is_list=True,
        ),
    ] = ""
    api_auth: Annotated[
        SecretStr | None,
        Field(description="user:password for HTTP Basic; several by commas."),
        _matching(
            r"[A-Za-z0-9_.@-]{1,100}:.*",
            "user:password, several by commas; users of ASCII letters, digits and _.@-",
            is_list=True,
        ),
    ] = None
    keys_file: Annotated[
        Path,
        Field(
            description="API keys, as hashes; made with `alphalayer keys add`; where the file is, a key is asked for."
        ),
    ] = Path("data/keys.json")
    device: Annotated[str, Field(description="auto, cuda, cuda:0, mps or cpu.")] = "auto"
    dtype: Annotated[
        Literal["auto", "fp16", "bf16", "fp32"],
        Field(description="Number format of UNet and decoder."),
    ] = "auto"
    memory: Annotated[
        Literal["auto", "high", "balanced", "low"],
        Field(description="What stays on the GPU: high from 16 GB on, balanced for 12, low for 8."),
    ] = "auto"
    noise: Annotated[
        NoiseSource, Field(description="Noise where a request names none; nv is portable.")
    ] = "nv"
    decode: Annotated[
        DecodeMode,
        Field(description="Transparent decode: official, or forge2 for Forge 2's pictures."),
    ] = "official"
    batch_pixels: Annotated[
        int | None,
        Field(
            ge=0,
            description="Pixels drawn together at most, over several jobs; 0: each job alone; unset: what the GPU has room for.",
        ),
    ] = None
    batch_wait_s: Annotated[
        float,
        Field(
            ge=0, le=10, description="Seconds that a batch which is not full waits for more jobs."
        ),
    ] = 0.02
    spare_model_gb: Annotated[
        float,
        Field(
            ge=0,
            description="Host memory for models that are not in use, so that going back to one needs no disk.",
        ),
    ] = 0.0
    queue_limit: Annotated[
        int, Field(ge=1, le=100_000, description="Jobs that may wait; more are answered 429.")
    ] = 200
    silence_limit_s: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds of silence after which an engine process that starts or works is taken for hung.",
        ),
    ] = 900.0
    webhook_secret: Annotated[
        SecretStr | None,
        Field(description="Signs webhooks; without it jobs with a webhook_url are refused."),
    ] = None
    webhook_allow_private: Annotated[
        bool, Field(description="Send webhooks into private networks and to this machine, too.")
    ] = False
    keep_pictures_days: Annotated[
        float, Field(ge=0, description="Pictures older than this are removed; 0: never.")
    ] = 0.0
    keep_pictures_bytes: Annotated[
        int,
        Field(
            ge=0, description="Above this size of all pictures the oldest are removed; 0: never."
        ),
    ] = 0
    keep_jobs_days: Annotated[
        float, Field(ge=0, description="Jobs that were over so long are forgotten; 0: never.")
    ] = 30.0
    drain_s: Annotated[
        int,
        Field(
            ge=0,
            description="Seconds that requests at work get to end when the service is stopped.",
        ),
    ] = 60
    max_request_pixels: Annotated[
        int,
        Field(
            ge=0,
            description="Pixels of all pictures of one request together, with a side left out counted as 1024; more are answered 422; "
            "0: no limit.",
        ),
    ] = 0
    max_request_bytes: Annotated[int, Field(ge=1024, description="Largest request body.")] = (
        16_000_000
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Least serious log lines shown."),
    ] = "info"
    log_prompts: Annotated[bool, Field(description="Write prompts into the log.")] = False
    tracing: Annotated[
        bool,
        Field(
            description="Send traces over OTLP; the OTEL_* variables of OpenTelemetry say where to."
        ),
    ] = False
    log_json: Annotated[
        bool, Field(description="Log one JSON object a line instead of readable text.")
    ] = False

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "" and info.field_name not in ("cors_allow_origins", "trusted_proxies"):
            raise ValueError("it is empty; leave it out where it is not meant")
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
        """Flags before environment before TOML file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @field_validator("role")
    @classmethod
    def _parts_need_a_shared_queue(cls, value: str, info: ValidationInfo) -> str:
        if value != "all" and not info.data.get("database", True):
            raise ValueError(f'"{value}" needs a database that is shared')
        return value

    @property
    def pictures(self) -> str:
        """Where pictures go: a folder's path, or the URL of a bucket."""
        return self.storage or str(self.outputs_dir)

    @property
    def embeddings(self) -> Path:
        """The folder of embeddings that is meant."""
        return self.embeddings_dir or self.models_dir.parent / "embeddings"

    def engine_options(self) -> dict[str, Any]:
        """The options of the engine process, as plain JSON values."""
        return {
            "models_dir": str(self.models_dir),
            "embeddings_dir": str(self.embeddings),
            "device": self.device,
            "dtype": self.dtype,
            "memory": self.memory,
            "default_model": self.default_model,
            "batch_pixels": self.batch_pixels,
            "spare_model_bytes": int(self.spare_model_gb * 1e9),
        }


def load_settings(**flags: Any) -> Settings:
    """Read the settings; flags that are None do not count.

    Raises:
        SetupFailed: an unknown name or a value that is not accepted; the message names it as it was given: flag, variable, or line.
    """
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {
        f"{PREFIX}TORCH",
        STARTED_BY,
        API_KEY,
    }
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise SetupFailed(f"unknown setting in the environment: {', '.join(unknown)}.", hint=_LIST)
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        field = Settings.model_fields.get(name)
        if field and field.annotation == SecretStr | None:
            first["input"] = "…"  # what was given may be a password in the wrong form
        raise SetupFailed(
            f"{_as_given(name, flags)}: {validation.describe_validation_error(first)}.", hint=_LIST
        ) from None
    except (OSError, ValueError) as error:
        raise SetupFailed(f"{TOML_FILE} cannot be read: {error}.", hint=_LIST) from None


def flag_of(name: str) -> str:
    """The flag of a setting or field."""
    return "--" + name.replace("_", "-")


def _as_given(name: str, flags: dict[str, Any]) -> str:
    if flags.get(name) is not None:
        return flag_of(name)
    variable = f"{PREFIX}{name.upper()}"
    return variable if os.environ.get(variable) else f"{TOML_FILE}, {name}"


_LIST = "All settings are in docs/reference/settings.md."
