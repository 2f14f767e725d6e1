"""The start line of the stack that Alphalayer replaces: `python launch.py --nowebui --api --listen --port 7861`.

Sets up as `run.py` does, then starts the service; the old flags and COMMANDLINE_ARGS are understood
(docs/guides/coming-from-forge.md). Models and pictures are beside this file, wherever it is called from.
"""

from __future__ import annotations

import sys

import run

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        raise SystemExit(0)
    try:
        raise SystemExit(run.main(["serve-as-before", "--home", str(run.ROOT), *sys.argv[1:]]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
