"""Start the service with the command line of Forge and AUTOMATIC1111.

    python launch.py --nowebui --api --listen --port 7861

Set up as `run.py` does, then translate the flags and COMMANDLINE_ARGS and start the service
(docs/guides/coming-from-forge.md). Models and images are in the folder of this file.

    --listen, --server-name ADDRESS     listen on all addresses, or on this one
    --port PORT                         port to listen on; default: 7861
    --api-auth USER:PASSWORD            require HTTP Basic; several pairs separated by commas
    --cors-allow-origins ORIGINS        origins of allowed pages, or "*"
    --loglevel LEVEL                    lowest level of log lines
    --models-dir, --embeddings-dir, --data-dir FOLDER
    --ckpt FILE                         default model, in models/Stable-diffusion/
    --device-id, --gpu-device-id NUMBER
    --always-cpu, --use-cpu all
    --no-half, --precision full, --all-in-fp32
    --all-in-fp16, --unet-in-fp16, --unet-in-bf16
    --lowvram, --medvram, --medvram-sdxl
    --always-gpu, --always-high-vram, --always-normal-vram, --always-low-vram, --always-no-vram
    --api, --nowebui                    always on

Any other flag is ignored with a warning.
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
