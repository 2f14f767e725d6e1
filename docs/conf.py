"""Configure the docs site: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "src"))

from alphalayer import __version__  # noqa: E402

project = "Alphalayer"
author = "The Alphalayer authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["adr/template.md"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"Alphalayer {release}"
html_copy_source = False
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    """Register the hook for links that leave the docs."""
    app.connect("source-read", _name_outside_paths)


def _name_outside_paths(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace links to folders and pages outside the docs by their path in the repository.

    The site holds the docs alone. A link to a missing path stays, so that the build reports it.
    """
    page = Path(app.env.doc2path(docname))

    def name(match: re.Match[str]) -> str:
        text, link = match[1], match[2]
        target = (page.parent / link).resolve()
        is_outside = target.is_relative_to(DOCS.parent) and not target.is_relative_to(DOCS)
        if not is_outside or not (target.is_dir() or (target.suffix == ".md" and target.exists())):
            return match[0]
        path = f"`{target.relative_to(DOCS.parent).as_posix()}`"
        return path if text.strip("`") == path.strip("`") else f"{text} ({path})"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)]*)?\)", name, source[0])
