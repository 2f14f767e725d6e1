"""Files around the code: docs site, citation, GitHub workflows and forms, links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"sphinx-build (.*) docs build/docs", makefile)
    assert options
    command = [
        sys.executable,
        "-m",
        "sphinx",
        *options[1].split(),
        "--quiet",
        str(source),
        str(target),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the docs site, built with warnings as errors."""
    pytest.importorskip("sphinx")
    target = tmp_path_factory.mktemp("site")
    result = _build(ROOT / "docs", target)
    assert result.returncode == 0, result.stderr
    return target


def test_docs_site_has_every_page(site: Path):
    pages = {
        path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")
    }
    pages -= {Path("adr/template")}
    assert len(pages) > 20
    assert [page for page in pages if not (site / page).with_suffix(".html").exists()] == []


def test_docs_site_loads_nothing_from_other_hosts(site: Path):
    loads = r"""<(?:script|img|link)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']+"""
    addresses = [
        match
        for page in site.rglob("*.html")
        for match in re.findall(loads, page.read_text(encoding="utf-8"))
    ]
    assert addresses == []


def test_docs_build_with_broken_links_fails(tmp_path: Path):
    pytest.importorskip("sphinx")
    for folder in ("docs", "folder"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "docs")
    (tmp_path / "src").symlink_to(ROOT / "src")
    links = ["#page", "../folder", "missing.md", "#missing", "../missing"]
    page = "# Page\n\n" + "\n\n".join(f"[text]({link})" for link in links)
    (tmp_path / "docs" / "index.md").write_text(page, encoding="utf-8")
    result = _build(tmp_path / "docs", tmp_path / "site")
    assert result.returncode == 1
    lines = re.findall(r"index\.md:(\d+): WARNING: .*xref_missing", result.stderr)
    assert lines == ["7", "9", "11"], result.stderr


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.citation-file-format", ["CITATION.cff"]),
        ("vendor.github-workflows", [f".github/workflows/{path.name}" for path in WORKFLOWS]),
        ("vendor.dependabot", [".github/dependabot.yml"]),
        (
            "vendor.github-issue-forms",
            [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"],
        ),
        ("vendor.github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"]),
        ("vendor.compose-spec", ["deploy/docker/compose.yaml"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_file_matches_its_schema(schema: str, files: list[str]):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_pins_actions_and_limits_time(path: Path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "permissions" in workflow
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for action in (step["uses"] for step in job["steps"] if "uses" in step):
            assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", action), action


def test_ci_covers_every_supported_python():
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert ci["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert {name.split("-")[0] for name in ci["jobs"]["smoke"]["strategy"]["matrix"]["os"]} == {
        "windows",
        "macos",
    }


def test_project_files_name_no_missing_repository():
    command = [
        "git",
        "grep",
        "-lE",
        r"github\.com/alphalayer|alphalayer\.(io|org|dev|ai|com)\b",
        "--",
        ".",
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert [
        name for name in listed.stdout.split() if name != "tests/unit/test_project_files.py"
    ] == []


def test_changelog_sections_are_those_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(
        re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:]
    )
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "adr").glob("0*.md")), ids=lambda path: path.name[:4]
)
def test_adr_follows_the_template(path: Path):
    headings = [
        re.findall(r"^## .+$", (path.parent / name).read_text(encoding="utf-8"), re.MULTILINE)
        for name in (path.name, "template.md")
    ]
    assert headings[0] == headings[1]
    assert re.search(
        r"^- Status: (proposed|accepted|superseded)", path.read_text(encoding="utf-8"), re.MULTILINE
    )
