"""The start line of the stack that Alphalayer replaces: `python launch.py --nowebui --api --listen --port 7861`.

Sets up as `run.py` does, then starts the service; the old flags and COMMANDLINE_ARGS are understood
(docs/guides/coming-from-forge.md). Models and pictures are beside this file, wherever it is called from.

    --listen, --server-name ADDRESS     listen on all addresses, or on this one
    --port PORT                         7861 where none is given
    --api-auth USER:PASSWORD            ask for them; several by commas
    --cors-allow-origins ORIGINS        pages that may ask, or "*"
    --loglevel LEVEL
    --models-dir, --embeddings-dir, --data-dir FOLDER
    --ckpt FILE                         the model of requests that name none, in models/Stable-diffusion/
    --device-id, --gpu-device-id NUMBER;  --always-cpu, --use-cpu all
    --no-half, --precision full, --all-in-fp32, --all-in-fp16, --unet-in-fp16, --unet-in-bf16
    --lowvram, --medvram, --medvram-sdxl, --always-gpu, --always-high-vram, --always-normal-vram, --always-low-vram, --always-no-vram
    --api, --nowebui                    always so

Any other flag is named and left out.
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
