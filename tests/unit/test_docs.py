"""The reference pages are generated from the program and current."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from alphalayer.catalog.download import PUBLISHED
from alphalayer.cli.app import load_command
from alphalayer.config import Settings
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.layers import plan_chain
from alphalayer.core.modes import MODES
from alphalayer.observability.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs"


def _generator():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "api.md", "metrics.md"])
def test_reference_pages_are_current(name):
    generated = _generator().PAGES[name]()
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == generated, (
        "run: python docs/generate.py"
    )


def test_every_setting_has_a_description_and_a_flag():
    options = {option for parameter in load_command("serve").params for option in parameter.opts}
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"--{name.replace('_', '-')}" in options


def test_model_files_guide_lists_each_published_file():
    guide = (DOCS / "guides" / "model-files.md").read_text(encoding="utf-8")
    for file in PUBLISHED:
        if file.folder == "layer_model":
            assert f"`{file.name}`" in guide
            assert f"`{file.filename.removesuffix('.safetensors')}`" in guide


def test_readme_lists_each_mode():
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for mode in MODES.values():
        if mode.files:
            file = mode.files[0].removesuffix(".safetensors")
            cells = (
                mode.label,
                ", ".join(mode.needs) or "–",
                ", ".join(mode.layers),
                f"`{file}`",
                f"`{mode.download}`",
            )
            assert f"| {' | '.join(cells)} |" in readme


def _names_of_chain(want, given, family):
    try:
        return ", ".join(f"`{mode.name}`" for mode in plan_chain(want, given, family))
    except InvalidRequest:
        return "–"


def test_layers_guide_lists_the_chains():
    guide = (DOCS / "guides" / "layers-and-edits.md").read_text(encoding="utf-8")
    table = guide.split("| Given | `want` | SDXL | SD 1.5 |\n|---|---|---|---|\n")[1].split("\n\n")[
        0
    ]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert len(rows) == 9
    for given, wants, *chains in rows:
        roles = [] if given == "–" else given.split(", ")
        for want in re.findall(r"`(\w+)`", wants):
            assert [_names_of_chain(want, roles, family) for family in ("sdxl", "sd15")] == chains


def test_every_field_and_parameter_of_the_api_is_described():
    rows = [
        line
        for line in (DOCS / "reference" / "api.md").read_text(encoding="utf-8").splitlines()
        if "|" in line
    ]
    assert len(rows) > 200
    assert [row for row in rows if row.endswith("|  |")] == []


def test_log_reference_lists_exactly_the_log_events():
    source = DOCS.parent / "src" / "alphalayer"
    calls = r'\b(?:log\.(?:debug|info|warning|error)|level)\(\s*f?"([\w.]+)[\w{}]*"'
    written = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(calls, path.read_text(encoding="utf-8"))
    }
    # the name of this event ends with the outcome
    written = written - {"webhook."} | {"webhook.delivered", "webhook.retried", "webhook.given_up"}
    page = (DOCS / "reference" / "logs.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)) == written


def test_dashboard_shows_exactly_the_metrics():
    dashboard = json.loads(
        (DOCS.parent / "deploy" / "grafana" / "alphalayer.json").read_text(encoding="utf-8")
    )
    shown = {
        re.sub(r"_(total|bucket|sum|count)$", "", name)
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"alphalayer_\w+", target["expr"])
    }
    registered = {family.name for family in Metrics().registry.collect()}
    assert shown == registered
