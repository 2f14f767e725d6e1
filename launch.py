"""The start line of the stack that Alphalayer replaces: `python launch.py --nowebui --api --listen --port 7861`.

Sets up as `run.py` does, then starts the service; the old flags and COMMANDLINE_ARGS are understood.
"""

from __future__ import annotations

import sys

import run

if __name__ == "__main__":
    try:
        raise SystemExit(run.main(["serve-as-before", *sys.argv[1:]]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
