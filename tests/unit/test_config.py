"""Settings: flags override the environment and the file; errors name the setting."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from alphalayer.config import Settings, load_settings
from alphalayer.core.errors import SetupFailed
from alphalayer.service.app import check


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working folder; remove our variables from the environment."""
    import os

    for name in list(os.environ):
        if name.startswith("ALPHALAYER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_defaults_serve_this_machine_only():
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 7861)
    assert settings.models_dir == Path("models")


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALPHALAYER_PORT", "9000")
    monkeypatch.setenv("ALPHALAYER_LOG_JSON", "true")
    settings = load_settings()
    assert settings.port == 9000
    assert settings.log_json is True


def test_settings_are_read_from_the_file(empty_folder: Path):
    (empty_folder / "alphalayer.toml").write_text('port = 9001\nmodels_dir = "elsewhere"\n')
    settings = load_settings()
    assert settings.port == 9001
    assert settings.models_dir == Path("elsewhere")


def test_settings_flags_override_environment_and_file(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (empty_folder / "alphalayer.toml").write_text('port = 1\nhost = "file"\ndevice = "cpu"\n')
    monkeypatch.setenv("ALPHALAYER_PORT", "2")
    monkeypatch.setenv("ALPHALAYER_HOST", "environment")
    settings = load_settings(port=3, host=None)
    assert (settings.port, settings.host, settings.device) == (3, "environment", "cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "0"), ("port", "65536"), ("port", "many"), ("memory", "huge"), ("dtype", "fp8"),
        ("noise", "dice"),
        ("queue_limit", "-1"), ("silence_limit_s", "0"), ("drain_s", "-1"), ("log_level", "loud"),
        ("trusted_proxies", "proxy.local"), ("api_auth", "useronly"), ("api_auth", "ann:a,bob"),
        ("api_auth", "jörg:pw"), ("storage", "ftp://x"), ("storage", "s3://"),
        ("database", "mysql://x/y"), ("public_url", "pics.example.com"), ("role", "api"),
        ("cors_allow_origins", "example.com"), ("cors_allow_origins", "https://example.com/page"),
        ("acceleration", "fast"), ("warm_up_sizes", "1024"), ("warm_up_sizes", "1024x1024,10x64"),
        ("warm_up_sizes", "64x4096"), ("unload_model_after_s", "inf"),
        ("unload_model_after_s", "1e10"), ("unload_model_after_s", "0.01"),
    ],
)  # fmt: skip
def test_settings_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(f"ALPHALAYER_{name.upper()}", value)
    with pytest.raises(SetupFailed, match=f"ALPHALAYER_{name.upper()}: ") as caught:
        load_settings()
    assert "Value error" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch):
    for name in Settings.model_fields:
        monkeypatch.setenv(f"ALPHALAYER_{name.upper()}", "")
    assert load_settings() == Settings.model_construct()


@pytest.mark.parametrize("name", ["database", "data_dir", "api_auth", "port"])
def test_settings_empty_flag_or_line_is_refused(empty_folder: Path, name: str):
    with pytest.raises(SetupFailed, match=f"--{name.replace('_', '-')}: it is empty"):
        load_settings(**{name: ""})
    (empty_folder / "alphalayer.toml").write_text(f'{name} = ""\n')
    with pytest.raises(SetupFailed, match=rf"alphalayer\.toml, {name}: it is empty"):
        load_settings()


def test_settings_valid_addresses_are_accepted():
    settings = load_settings(
        trusted_proxies="127.0.0.1, 10.0.0.0/8,*",
        api_auth="ann:a,bob:b:c",
        public_url="https://pics.example.com/draw/",
        cors_allow_origins="https://example.com, http://localhost:3000",
        storage="s3://bucket/prefix",
        database="postgres://user:pass,word@host/name",
        role="worker",
        warm_up_sizes="1024x1024,832x1216",
    )
    assert settings.role == "worker"
    assert settings.engine_options()["warm_up_sizes"] == [(1024, 1024), (832, 1216)]
    assert load_settings(cors_allow_origins="*", trusted_proxies="").cors_allow_origins == "*"


def test_settings_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALPHALAYER_PROT", "80")
    with pytest.raises(SetupFailed, match="ALPHALAYER_PROT"):
        load_settings()


def test_settings_variable_of_the_start_script_is_accepted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALPHALAYER_TORCH", "cpu")
    load_settings()


def test_settings_unknown_name_in_the_file_is_named(empty_folder: Path):
    (empty_folder / "alphalayer.toml").write_text("prot = 80\n")
    with pytest.raises(SetupFailed, match=r"alphalayer\.toml, prot: there is no such"):
        load_settings()


def test_settings_file_that_is_not_toml_is_named(empty_folder: Path):
    (empty_folder / "alphalayer.toml").write_text("port = = 80\n")
    with pytest.raises(SetupFailed, match=r"alphalayer\.toml"):
        load_settings()


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]


def test_settings_passwords_are_not_shown():
    settings = load_settings(api_auth="user:open-sesame", webhook_secret="swordfish")
    assert "open-sesame" not in repr(settings)
    assert "swordfish" not in repr(settings)
    assert settings.api_auth is not None
    assert settings.api_auth.get_secret_value() == "user:open-sesame"


def test_engine_options_are_json():
    options = load_settings(models_dir=Path("m"), device="cpu").engine_options()
    assert json.loads(json.dumps(options)) == options
    assert (options["models_dir"], options["device"]) == ("m", "cpu")


def test_settings_invalid_secret_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alphalayer.toml").write_text("webhook_secret = 424242\n")
    with pytest.raises(SetupFailed) as raised:
        load_settings()
    assert "webhook_secret" in str(raised.value)
    assert "424242" not in str(raised.value)


@pytest.mark.parametrize(
    ("outputs", "others"),
    [
        (".", {}),
        ("..", {}),
        ("data", {}),
        ("link", {}),
        ("models", {}),
        ("images", {"data_dir": "images/data"}),
        ("images", {"keys_file": "images/keys.json"}),
        ("images", {"models_dir": "/srv/models", "embeddings_dir": "images/x/y"}),
        ("/srv/alphalayer", {"models_dir": "/srv/alphalayer/models"}),
    ],
)
def test_settings_outputs_that_hold_other_files_are_refused(
    empty_folder: Path, outputs: str, others: dict[str, str]
):
    (empty_folder / "link").symlink_to(empty_folder)
    settings = load_settings(outputs_dir=outputs, **others)
    with pytest.raises(SetupFailed, match=r"outputs_dir: the folder of images .* also holds"):
        settings.check_folders()
    with pytest.raises(SetupFailed, match="outputs_dir"):
        asyncio.run(check(settings.model_copy(update={"role": "api"})))


def test_settings_outputs_beside_other_files_are_accepted():
    for outputs in ("outputs", "data/outputs", "/srv/outputs"):
        load_settings(outputs_dir=outputs).check_folders()
    load_settings(outputs_dir=".", storage="s3://images").check_folders()
