"""Writes the reference pages from the program itself: `python docs/generate.py`. A test fails when they are out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase
from typer.main import get_command

from alphalayer.app import create_app
from alphalayer.cli import app as cli
from alphalayer.config import PREFIX, TOML_FILE, Settings
from alphalayer.request import SAMPLERS, SCHEDULERS
from alphalayer.telemetry import Metrics

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- made by docs/generate.py; do not edit -->"


def settings_page() -> str:
    """Every setting with its environment variable, default and meaning."""
    lines = [
        "# Settings",
        NOTE,
        "",
        f"A setting is taken from the command line (`alphalayer serve`; `--no-…` switches off), else from the environment (`{PREFIX}…`),",
        f"else from `{TOML_FILE}` in the folder that the service is started in. Unknown names and wrong values stop the start.",
        "",
        "| setting (TOML) | environment | flag | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "") else f"`{field.default}`"
        flag = "--" + name.replace("_", "-")
        lines.append(f"| `{name}` | `{PREFIX}{name.upper()}` | `{flag}` | {default} | {field.description} |")
    lines += [
        "",
        "Also read: `COMMANDLINE_ARGS` (by `launch.py`), `CUDA_VISIBLE_DEVICES` (one engine process per GPU listed), "
        f"`{PREFIX}TORCH` (by `run.py`: `cpu` or `cuda`).",
    ]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Every command with its help."""
    lines = ["# The command", NOTE, ""]

    def add(command: Any, path: str, context: Any) -> None:
        if getattr(command, "commands", None):
            for name, child in sorted(command.commands.items()):
                if not child.hidden:
                    add(child, f"{path} {name}", typer.Context(child, parent=context, info_name=name))
            return
        lines.extend([f"## `{path}`", "", command.help or "", "", "| option | meaning |", "|---|---|"])
        for parameter in command.params:
            if parameter.name != "help":
                names = ", ".join(f"`{each}`" for each in [*parameter.opts, *parameter.secondary_opts])
                shown = names if parameter.param_type_name == "option" else f"`{(parameter.name or '').upper()}`"
                lines.append(f"| {shown} | {getattr(parameter, 'help', '') or ''} |")
        lines.append("")

    root = get_command(cli)
    add(root, "alphalayer", typer.Context(root, info_name="alphalayer"))
    return "\n".join(lines)


def api_page() -> str:
    """Every route, its fields and its answers, from the OpenAPI description."""
    description = create_app(Settings()).openapi()
    schemas = description["components"]["schemas"]
    lines = ["# The HTTP interface", NOTE, "", "The same is at `/docs` of a running service, to be tried out.", ""]
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            lines += [f"## {method.upper()} `{path}`", "", route.get("summary", ""), ""]
            if route.get("description"):
                lines += [route["description"], ""]
            body = (
                route.get("requestBody", {})
                .get("content", {})
                .get("application/json", {})
                .get("schema", {})
                .get("$ref")
            )
            if body:
                lines += _fields(schemas[body.rpartition("/")[2]])
            answers = [f"{status} {answer['description'].rstrip('.')}" for status, answer in route["responses"].items()]
            lines += ["Answers: " + "; ".join(answers) + ".", ""]
    lines += [f"Samplers: {', '.join(SAMPLERS)}. Schedulers: {', '.join(SCHEDULERS)}.", ""]
    return "\n".join(lines)


def _fields(schema: dict[str, Any]) -> list[str]:
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "must be given" if name in schema.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        lines.append(f"| `{name}` | {default} | {field.get('description', '')} |")
    return [*lines, ""]


def metrics_page() -> str:
    """Every metric of `GET /metrics`."""
    lines = [
        "# Metrics",
        NOTE,
        "",
        "What `GET /metrics` answers, for Prometheus.",
        "",
        "| metric | labels | meaning |",
        "|---|---|---|",
    ]
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            name = metric._name + ("_total" if isinstance(metric, Counter) else "")
            lines.append(f"| `{name}` | {', '.join(metric._labelnames)} | {metric._documentation} |")
    return "\n".join(lines) + "\n"


PAGES = {"settings.md": settings_page, "cli.md": cli_page, "api.md": api_page, "metrics.md": metrics_page}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
