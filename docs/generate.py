"""Writes the reference pages from the program itself: `python docs/generate.py`. A test fails when they are out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase
from typer.main import get_command

from alphalayer.cli.app import app as cli
from alphalayer.config import PREFIX, TOML_FILE, Settings
from alphalayer.core.request import MAX_SEED, NOT_BLANK, SAMPLERS, SCHEDULERS
from alphalayer.observability.metrics import Metrics
from alphalayer.service.app import create_app

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- made by docs/generate.py; do not edit -->"


def settings_page() -> str:
    """Every setting with its environment variable, default and meaning."""
    lines = [
        "# Settings",
        NOTE,
        "",
        f"A setting is taken from the command line (`alphalayer serve`; `--no-…` switches off), else from the environment (`{PREFIX}…`),",
        f"else from `{TOML_FILE}` in the folder that the service is started in. Unknown names and wrong values stop the start; "
        "an empty variable is none.",
        "",
        "| setting (TOML) | environment | flag | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "") else f"`{field.default}`"
        flag = "--" + name.replace("_", "-")
        lines.append(
            f"| `{name}` | `{PREFIX}{name.upper()}` | `{flag}` | {default} | {field.description} |"
        )
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
                    add(
                        child,
                        f"{path} {name}",
                        typer.Context(child, parent=context, info_name=name),
                    )
            return
        lines.extend(
            [f"## `{path}`", "", command.help or "", "", "| option | meaning |", "|---|---|"]
        )
        for parameter in command.params:
            if parameter.name != "help":
                names = ", ".join(
                    f"`{each}`" for each in [*parameter.opts, *parameter.secondary_opts]
                )
                shown = (
                    names
                    if parameter.param_type_name == "option"
                    else f"`{(parameter.name or '').upper()}`"
                )
                lines.append(f"| {shown} | {getattr(parameter, 'help', '') or ''} |")
        lines.append("")

    root = get_command(cli)
    add(root, "alphalayer", typer.Context(root, info_name="alphalayer"))
    return "\n".join(lines)


def api_page() -> str:
    """Every route with its parameters, fields and answers, and the objects in them, from the OpenAPI description."""
    description = create_app(Settings()).openapi()
    schemas = description["components"]["schemas"]
    lines = [
        "# The HTTP interface",
        NOTE,
        "",
        "The same is at `/docs` of a running service, to be tried out.",
        "",
    ]
    named: dict[str | None, None] = {}
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            lines += [f"## {method.upper()} `{path}`", "", route.get("summary", ""), ""]
            if route.get("description"):
                lines += [route["description"], ""]
            lines += _parameters(route.get("parameters", []))
            if "requestBody" in route:
                body = schemas[_json_of(route["requestBody"])]
                lines += _fields(body)
                named |= dict.fromkeys(map(_named, body["properties"].values()))
            answers = [_answer(status, answer) for status, answer in route["responses"].items()]
            lines += ["Answers: " + "; ".join(answers) + ".", ""]
            named |= dict.fromkeys(map(_json_of, route["responses"].values()))
    lines += [f"Samplers: {', '.join(SAMPLERS)}. Schedulers: {', '.join(SCHEDULERS)}.", ""]
    return "\n".join(lines + _objects([name for name in named if name], schemas))


def _json_of(message: dict[str, Any]) -> str | None:
    """The name of the object that a body is, None for those that are none."""
    for content in message.get("content", {}).values():
        return _named(content.get("schema", {}))
    return None


def _named(schema: dict[str, Any]) -> str | None:
    """The name of an object, also as one of several choices or as the items of a list."""
    inside = [schema, schema.get("items", {}), *schema.get("anyOf", [])]
    return next((each["$ref"].rpartition("/")[2] for each in inside if "$ref" in each), None)


def _title(name: str) -> str:
    """Dialects have objects of one name: `native.Model`."""
    return ".".join(name.split("__")[-2:])


def _answer(status: str, answer: dict[str, Any]) -> str:
    name = _json_of(answer)
    what = (
        ""
        if answer["description"] == "Successful Response"
        else f" {answer['description'].rstrip('.')}"
    )
    return f"{status}{what}" + (f" (`{_title(name)}`)" if name else "")


def _meaning(field: dict[str, Any]) -> str:
    """Its description, which stands inside where a field may be null, and what is allowed; an object among it is named."""
    inside = [field, *field.get("anyOf", [])]
    found = next((each["description"] for each in inside if each.get("description")), "")
    limits = next(filter(None, map(_limits, inside)), "")
    name = _named(field)
    return " ".join(filter(None, [found, limits and f"({limits})", name and f"`{_title(name)}`"]))


def _limits(schema: dict[str, Any]) -> str:
    """What a value may be: "64 to 2048", "one of ...", `a pattern`; lists that stand at the end of the page are left out."""
    if "minimum" in schema and "maximum" in schema:
        return (
            f"{schema['minimum']:g} to {schema['maximum']:g}"
            if schema["maximum"] < MAX_SEED
            else "-1 to 2^63 - 1"
        )
    if len(schema.get("enum", ())) > 1 and schema["enum"] not in (list(SAMPLERS), list(SCHEDULERS)):
        return f"one of {', '.join(f'`{each}`' for each in schema['enum'])}"
    if schema.get("pattern", NOT_BLANK) != NOT_BLANK:
        return f"`{schema['pattern']}`".replace("|", "\\|")
    longest = [(schema.get("maxLength"), "characters"), (schema.get("maxItems"), "entries")]
    return next((f"at most {count} {what}" for count, what in longest if count), "")


def _parameters(parameters: list[dict[str, Any]]) -> list[str]:
    if not parameters:
        return []
    lines = ["| parameter | where | default | meaning |", "|---|---|---|---|"]
    for each in parameters:
        default = (
            "must be given"
            if each["required"]
            else f"`{json.dumps(each['schema'].get('default'))}`"
        )
        lines.append(
            f"| `{each['name']}` | {each['in']} | {default} | {_meaning({**each['schema'], **each})} |"
        )
    return [*lines, ""]


def _fields(schema: dict[str, Any]) -> list[str]:
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        default = (
            "must be given"
            if name in schema.get("required", ())
            else f"`{json.dumps(field.get('default'))}`"
        )
        lines.append(f"| `{name}` | {default} | {_meaning(field)} |")
    return [*lines, ""]


def _objects(names: list[str], schemas: dict[str, Any]) -> list[str]:
    """The objects of these names and those inside them."""
    lines = ["# Objects", ""]
    for name in names:
        schema = schemas[name]
        if "properties" not in schema:
            continue
        lines += [
            f"## `{_title(name)}`",
            "",
            schema.get("description", ""),
            "",
            "| field | meaning |",
            "|---|---|",
        ]
        for field, about in schema["properties"].items():
            inner = _named(about)
            if inner and inner not in names:
                names.append(inner)
            lines.append(f"| `{field}` | {_meaning(about)} |")
        lines.append("")
    return lines


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
            lines.append(
                f"| `{name}` | {', '.join(metric._labelnames)} | {metric._documentation} |"
            )
    return "\n".join(lines) + "\n"


PAGES = {
    "settings.md": settings_page,
    "cli.md": cli_page,
    "api.md": api_page,
    "metrics.md": metrics_page,
}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
