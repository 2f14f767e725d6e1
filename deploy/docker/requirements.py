"""Print what the package needs, with some of its extras, and not the package itself: `python requirements.py shared,mcp`."""

import sys
from pathlib import Path

import tomllib

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [project["optional-dependencies"][name] for name in sys.argv[1].split(",") if name]
print("\n".join(sum(extras, project["dependencies"])))
