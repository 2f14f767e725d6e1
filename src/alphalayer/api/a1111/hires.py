"""The second pass of AUTOMATIC1111, "hires fix": its fields in a body, and what they mean."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from alphalayer.api.a1111.lists import SCHEDULES, expand_aliases
from alphalayer.api.a1111.settings import is_used
from alphalayer.api.deps import wire_names
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import (
    CfgScale,
    HiresPrompt,
    HiresScale,
    HiresSide,
    HiresSteps,
    HiresStrength,
    HiresUpscaler,
)
from alphalayer.core.samplers import AUTOMATIC, choose_sampler, split_sampler_name
from alphalayer.core.values import Frozen, parse_as

HIRES_FIELDS = {
    "hires_scale": "hr_scale",
    "hires_upscaler": "hr_upscaler",
    "hires_steps": "hr_second_pass_steps",
    "hires_strength": "denoising_strength",
    "hires_width": "hr_resize_x",
    "hires_height": "hr_resize_y",
    "hires_cfg_scale": "hr_cfg",
    "hires_prompt": "hr_prompt",
    "hires_negative_prompt": "hr_negative_prompt",
}
"""Fields of `GenerationRequest`, and their names in a body."""
SAME = ("", "Use same checkpoint", "Use same sampler", "Use same scheduler", "Use same choices")
"""Values that mean those of the first pass."""


class HiresBody(Frozen, frozen=True):
    """Fields of the second pass in a body. Without `enable_hr` they are not read."""

    enable_hr: Annotated[Any, Field(description="Add a second pass at a larger size.")] = False
    denoising_strength: Annotated[
        Any, Field(description="Share of the noise that the second pass adds.")
    ] = 0.75
    hr_scale: Annotated[Any, Field(description="Factor of both sides, from 1 to 4.")] = 2.0
    hr_upscaler: Annotated[
        Any, Field(description="One of `latent-upscale-modes` or `upscalers`.")
    ] = "Latent"
    hr_second_pass_steps: Annotated[Any, Field(description="0: as many as in the first.")] = 0
    hr_resize_x: Annotated[Any, Field(description="Width instead of hr_scale.")] = 0
    hr_resize_y: Annotated[Any, Field(description="Height instead of hr_scale.")] = 0
    hr_sampler_name: Annotated[
        str | None, Field(max_length=100, description="Null: as in the first pass.")
    ] = None
    hr_scheduler: Annotated[
        str | None, Field(max_length=100, description="Null: as in the first pass.")
    ] = None
    hr_prompt: Annotated[Any, Field(description="Empty: as in the first pass.")] = ""
    hr_negative_prompt: Annotated[Any, Field(description="Empty: as in the first pass.")] = ""
    hr_cfg: Annotated[Any, Field(description="Null or 0: as in the first pass.")] = None
    hr_checkpoint_name: Annotated[Any, Field(description="Only that of the first pass.")] = None
    hr_additional_modules: Annotated[Any, Field(description="Not implemented.")] = None

    def second_pass(
        self, size: tuple[int, int], sampler: str, scheduler: str | None
    ) -> dict[str, Any]:
        """Return the fields of `GenerationRequest` for the second pass.

        Args:
            size: Width and height of the first pass.
            sampler: Sampler of the first pass as sent, also with its schedule.
            scheduler: Schedule of the first pass as sent, None if only the sampler has one.

        Raises:
            InvalidRequest: A field is wrong or not implemented.
        """
        for name in ("hr_checkpoint_name", "hr_additional_modules"):
            value = getattr(self, name)
            if value not in (None, []) and not all(part in SAME for part in _list(value)):
                raise InvalidRequest(
                    "another model in the second pass is not implemented.",
                    hint="Leave it out.",
                    field=name,
                )
        values = {name: getattr(self, wire) for name, wire in HIRES_FIELDS.items()}
        if not is_used(self.hr_cfg):
            values["hires_cfg_scale"] = None
        if is_used(self.hr_resize_x) or is_used(self.hr_resize_y):
            values["hires_scale"] = 1
        with wire_names(HIRES_FIELDS):
            fields = parse_as(_SecondPass, values).model_dump()
        if fields["hires_scale"] == 1 and not (fields["hires_width"] or fields["hires_height"]):
            fields |= {"hires_width": size[0], "hires_height": size[1]}
        own_sampler, own_scheduler = _own(self.hr_sampler_name), _own(self.hr_scheduler)
        if own_sampler or own_scheduler:
            first = _schedule(scheduler) or split_sampler_name(expand_aliases(sampler))[1]
            with wire_names({"sampler": "hr_sampler_name", "scheduler": "hr_scheduler"}):
                fields["hires_sampler"], fields["hires_scheduler"] = choose_sampler(
                    expand_aliases(own_sampler or sampler),
                    _schedule(own_scheduler),
                    first or AUTOMATIC,
                )
        return fields


class _SecondPass(Frozen, frozen=True):
    """Fields of the second pass, as `GenerationRequest` has them."""

    hires_scale: HiresScale
    hires_upscaler: HiresUpscaler
    hires_steps: HiresSteps
    hires_strength: HiresStrength
    hires_width: HiresSide
    hires_height: HiresSide
    hires_cfg_scale: CfgScale | None
    hires_prompt: HiresPrompt
    hires_negative_prompt: HiresPrompt


def _own(value: str | None) -> str | None:
    """Return the name of a sampler or schedule, None for that of the first pass."""
    return None if value in SAME else value


def _schedule(name: str | None) -> str | None:
    """Return a schedule by the name that AUTOMATIC1111 lists."""
    return SCHEDULES.get(name.lower(), name) if name else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
