"""Train the embedded model from nothing to the shipped folder: `python -m training`.

Stages with a result are left out, except those that train on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

from training import patch, phrases, text


def main() -> None:
    """Run the stages in order, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-minutes", type=float, default=20)
    parser.add_argument("--autoencoder-minutes", type=float, default=180)
    parser.add_argument("--unet-minutes", type=float, default=600)
    parser.add_argument("--patch-minutes", type=float, default=10)
    parser.add_argument(
        "--processes", type=int, default=2, help="processes of one thread that train the UNet"
    )
    parser.add_argument("--only", help="run this stage alone, even if it has a result")
    options = parser.parse_args()
    torchrun = ["-m", "torch.distributed.run", "--master-port=29561"]
    torchrun.append(f"--nproc-per-node={options.processes}")
    unet = [] if torch.cuda.is_available() else torchrun
    commands: dict[str, list[str]] = {
        "data": ["-m", "training.data"],
        "text": ["-m", "training.text", f"--minutes={options.text_minutes}"],
        "autoencoder": ["-m", "training.autoencoder", f"--minutes={options.autoencoder_minutes}"],
        "latents": ["-m", "training.latents"],
        "phrases": ["-m", "training.phrases"],
        "unet": [*unet, "-m", "training.unet", f"--minutes={options.unet_minutes}"],
        "patch": ["-m", "training.patch", f"--minutes={options.patch_minutes}"],
        "decoder": ["-m", "training.decoder"],
        "export": ["-m", "training.export"],
        "contact_sheet": ["-m", "training.contact_sheet"],
        "evaluate": ["-m", "training.evaluate"],
    }
    if options.only not in (None, *commands):
        parser.error(f"--only: got {options.only}; one of {', '.join(commands)}.")
    results = {"text": text.CHECKPOINT, "phrases": phrases.ROWS, "patch": patch.CHECKPOINT}
    for stage, command in commands.items():
        if options.only not in (None, stage):
            continue
        if options.only is None and stage in results and results[stage].is_file():
            print(f"{stage}: has a result ({results[stage]})")
            continue
        start = time.time()
        subprocess.run([sys.executable, *command], check=True)
        print(f"{stage}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
