"""Trains the embedded model from nothing to the shipped folder: `python -m training`.

Started again it leaves out text, latents, wordings and patch if they are there, and ends an autoencoder that was stopped; refine, unet and
decoder train what there is once more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

from training import autoencoder, latents, patch, text, wordings

STAGES = (
    *("data", "text", "autoencoder", "refine", "latents", "wordings", "unet", "patch", "decoder"),
    *("export", "contact_sheet", "evaluate"),
)


def main() -> None:
    """Run the stages in order, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-minutes", type=float, default=12)
    parser.add_argument("--autoencoder-steps", type=int, default=autoencoder.STEPS)
    parser.add_argument("--refine-steps", type=int, default=1100)
    parser.add_argument("--unet-minutes", type=float, default=480)
    parser.add_argument("--patch-minutes", type=float, default=10)
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes of one thread each that train the autoencoder and the UNet"
    )
    parser.add_argument("--only", choices=STAGES, help="this stage alone, though it was done")
    options = parser.parse_args()
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={options.ranks}", "--master-port=29561"]
    unet = [] if torch.cuda.is_available() else torchrun
    commands: dict[str, list[str]] = {
        "data": ["-m", "training.data"],
        "text": ["-m", "training.text", f"--minutes={options.text_minutes}"],
        "autoencoder": [*torchrun, "-m", "training.autoencoder", f"--steps={options.autoencoder_steps}"],
        "refine": ["-m", "training.autoencoder", f"--refine={options.refine_steps}"],
        "latents": ["-m", "training.latents"],
        "wordings": ["-m", "training.wordings"],
        "unet": [*unet, "-m", "training.unet", f"--minutes={options.unet_minutes}"],
        "patch": ["-m", "training.patch", f"--minutes={options.patch_minutes}"],
        "decoder": ["-m", "training.decoder"],
        "export": ["-m", "training.export"],
        "contact_sheet": ["-m", "training.contact_sheet"],
        "evaluate": ["-m", "training.evaluate"],
    }
    done = {"text": text.CHECKPOINT, "latents": latents.SUBJECTS, "wordings": wordings.POOLS, "patch": patch.CHECKPOINT}
    for stage, command in commands.items():
        if options.only not in (None, stage):
            continue
        if options.only is None and stage in done and done[stage].is_file():
            print(f"{stage}: done before ({done[stage]})")
            continue
        start = time.time()
        subprocess.run([sys.executable, *command], check=True)
        print(f"{stage}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
