"""The `info` object of AUTOMATIC1111, which two dialects and the Runpod worker return."""

from __future__ import annotations

import time
from typing import Any

from alphalayer import __version__
from alphalayer.core.job import Job
from alphalayer.images.infotext import denoising_strength, extra_pairs, write_parameters


def webui_info(job: Job) -> dict[str, Any]:
    """Return the `info` object of a job that is done, with the keys of AUTOMATIC1111.

    If something of the request was ignored, `warnings` is the last key.
    """
    assert job.result is not None, job.id
    result, request = job.result, job.request
    seeds = [image.seed for image in result.images]
    subseeds = [image.subseed for image in result.images]
    generated_by = [(image, job.request_of(image)) for image in result.images]
    infotexts = [
        write_parameters(one, result.model_name, result.model_hash, image.seed, image.subseed)
        if one
        else ""
        for image, one in generated_by
    ]
    return {
        "prompt": request.prompt,
        "all_prompts": [(one or request).prompt for _, one in generated_by],
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": subseeds[0],
        "all_subseeds": subseeds,
        "subseed_strength": request.subseed_strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": request.sampler,
        "cfg_scale": request.cfg_scale,
        "steps": request.steps,
        "batch_size": request.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": result.model_name,
        "sd_model_hash": result.model_hash,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": denoising_strength(request),
        "extra_generation_params": {
            **extra_pairs(request),
            "Schedule type": request.scheduler,
        },
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created_at)),
        "clip_skip": request.clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": f"alphalayer-{__version__}",
        **({"warnings": list(result.warnings)} if result.warnings else {}),
    }
