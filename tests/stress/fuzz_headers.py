"""Coverage-guided fuzzing of the readers of model files.

The first byte of an input selects the reader: of a safetensors header, whose length is added, of
a whole file, or of a JSON config. Each must return, or raise `CorruptFile`.

atheris is not a dependency. Install it beside the project, and pass a folder for the corpus:

    python -m venv /somewhere/atheris
    /somewhere/atheris/bin/pip install atheris
    PYTHONPATH=src /somewhere/atheris/bin/python tests/stress/fuzz_headers.py corpus \
        -max_total_time=600 -max_len=4096
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import tempfile
from pathlib import Path

SEEDS = (
    b"\0" + json.dumps({"a": {"dtype": "F16", "shape": [1, 0], "data_offsets": [0, 0]}}).encode(),
    b"\0" + json.dumps({"__metadata__": {"format": "pt"}}).encode(),
    b"\1" + struct.pack("<Q", 2) + b"{}",
    b"\2" + json.dumps({"sample_size": 128, "block_out_channels": [320, 640]}).encode(),
)


def main() -> None:
    """Fuzz until the time of the command line is over, or an input fails."""
    import atheris

    with atheris.instrument_imports(include=["alphalayer.catalog", "json"]):
        from alphalayer.catalog import read_config
        from alphalayer.catalog.headers import read_header
        from alphalayer.catalog.kinds import FAMILY_NAMES, family_of
        from alphalayer.core.errors import CorruptFile

    file = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None), "x")  # noqa: PTH112

    def check(data: bytes) -> None:
        kind, content = data[:1], data[1:]
        head = b"" if kind in (b"\1", b"\2") else struct.pack("<Q", len(content))
        file.write_bytes(head + content)
        with contextlib.suppress(CorruptFile):
            if kind == b"\2":
                assert isinstance(read_config(file), dict)
            else:
                assert family_of(read_header(file).shapes) in FAMILY_NAMES

    corpus = next((Path(arg) for arg in sys.argv[1:] if not arg.startswith("-")), None)
    if corpus:
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(SEEDS):
            (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
