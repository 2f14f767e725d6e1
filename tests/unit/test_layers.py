"""Chains of layers: which modes run, what their requests are, and what is stored."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from alphalayer.api.jobs import _problem
from alphalayer.api.native.fields import FIELDS, SpecContext
from alphalayer.api.native.layers import LayersRequest
from alphalayer.api.uploads import StoredInput
from alphalayer.core.errors import Cancelled, FileMissing, InvalidRequest, OutOfMemory
from alphalayer.core.job import Job, JobProgress, JobSpec
from alphalayer.core.layers import CONDITIONS, STACK, Want, plan_chain
from alphalayer.core.modes import MODES, LayerRole
from alphalayer.engine.base import GenerationResult, RenderTask, RgbaImage
from alphalayer.engine.fake import FakeEngine
from alphalayer.images import codecs
from alphalayer.images.infotext import read_parameters
from alphalayer.images.layered import composite_layers
from alphalayer.images.resampling import fit_layer
from alphalayer.storage.inputs import store_input
from alphalayer.storage.objects import ObjectStorage, open_storage
from alphalayer.worker.render import Renderer

SMALL = {"width": 64, "height": 64, "steps": 2}


class Recording(FakeEngine):
    """A fake engine that keeps the tasks of each call."""

    def __init__(self, step_s: float = 0.0):
        super().__init__(step_s)
        self.calls: list[list[RenderTask]] = []

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        self.calls.append(list(tasks))
        return super().render(tasks)


@pytest.fixture
def storage(tmp_path: Path) -> ObjectStorage:
    return open_storage(str(tmp_path))


def noise(seed: int, *, opaque: bool = False, size: tuple[int, int] = (64, 64)) -> RgbaImage:
    rgba = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    rgba[..., 3] |= 255 if opaque else 0
    return rgba


def upload(storage: ObjectStorage, rgba: RgbaImage) -> StoredInput:
    name = store_input(storage, codecs.encode(rgba))
    return StoredInput(name, rgba.shape[1], rgba.shape[0], bool(rgba[..., 3].min() == 255), "")


def job_of(images: dict[str, StoredInput] | None = None, **fields) -> Job:
    body = LayersRequest(prompt="an apple", **{**SMALL, **fields})
    return Job.new(body.to_spec(SpecContext("nv", "official", images=images or {})))


def read(storage: ObjectStorage, tmp_path: Path, key: str) -> tuple[RgbaImage, str | None]:
    return codecs.decode((tmp_path / key).read_bytes())


@pytest.mark.parametrize(
    ("want", "roles", "modes"),
    [
        ("layers", "", "attention fg2ble fgble2bg"),
        ("foreground", "", "attention"),
        ("blended", "", "attention fg2ble"),
        ("background", "", "attention fg2ble fgble2bg"),
        ("layers", "foreground", "fg2ble fgble2bg"),
        ("background", "foreground", "fg2ble fgble2bg"),
        ("blended", "foreground", "fg2ble"),
        ("layers", "background", "bg2ble bgble2fg"),
        ("foreground", "background", "bg2ble bgble2fg"),
        ("blended", "background", "bg2ble"),
        ("background", "foreground blended", "fgble2bg"),
        ("layers", "foreground blended", "fgble2bg"),
        ("foreground", "background blended", "bgble2fg"),
    ],
)
def test_chain_makes_the_wanted_layer(want: Want, roles: str, modes: str):
    assert [mode.name for mode in plan_chain(want, roles.split())] == modes.split()


def test_every_chain_has_the_inputs_that_its_modes_need():
    for family in ("sdxl", "sd15"):
        for count in range(4):
            for roles in itertools.combinations(CONDITIONS, count):
                try:
                    chain = plan_chain("layers", roles, family)
                except InvalidRequest:
                    continue
                layers: set[LayerRole] = set(roles)
                assert set(chain[0].needs) == set(roles)
                for mode in chain:
                    assert set(mode.needs) <= layers
                    layers |= set(mode.layer_roles)
                assert {mode.family for mode in chain} == {family}
                assert {"foreground", "background"} <= layers


@pytest.mark.parametrize(
    ("want", "roles", "mode"),
    [
        ("layers", "", "sd15_joint"),
        ("blended", "", "sd15_joint"),
        ("foreground", "", "sd15_attention"),
        ("layers", "foreground", "sd15_fg2bg"),
        ("foreground", "background", "sd15_bg2fg"),
    ],
)
def test_mode_of_sd15_makes_all_layers_at_once(want: Want, roles: str, mode: str):
    assert [one.name for one in plan_chain(want, roles.split(), "sd15")] == [mode]


def test_sets_of_shared_attention_are_stacked(storage: ObjectStorage):
    body = LayersRequest(prompt="an apple", background_prompt="a table", batch_size=2, **SMALL)
    job = Job.new(body.to_spec(SpecContext("nv", "official", family="sd15")))
    request = job.spec.generation
    assert (request.mode, request.batch_size, job.spec.sets) == ("sd15_joint", 6, 2)
    # the mode itself reads the additional prompts
    assert (request.prompt, request.background_prompt) == ("an apple", "a table")
    images = Renderer(Recording(), storage).run(job).images
    assert [image.role for image in images] == [*STACK, *STACK]
    seeds = [image.seed - request.seed for image in images]
    # as foreground, background, blended of each set, and the composite's is that of the first
    assert seeds == [1, 0, 2, 0, 4, 3, 5, 3]


@pytest.mark.parametrize(
    ("want", "roles", "family", "field", "words"),
    [
        ("foreground", "foreground", "sdxl", "want", "given already"),
        ("layers", "blended", "sdxl", "blended", "foreground and blended"),
        ("layers", "foreground background", "sdxl", "foreground", "no mode of sdxl"),
        ("layers", "", "other", "model", "a model of SDXL"),
    ],
)
def test_chain_without_sense_is_refused(
    want: Want, roles: str, family: str, field: str, words: str
):
    with pytest.raises(InvalidRequest) as caught:
        plan_chain(want, roles.split(), family)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_stages_have_their_prompts_and_recommended_samplers():
    job = job_of(background_prompt="a table", blended_prompt="at noon", seed=5)
    first, blended, background = job.spec.requests
    assert (first.mode, first.prompt, first.sampler) == ("attention", "an apple", None)
    assert (blended.prompt, blended.sampler) == ("at noon, an apple", None)
    assert (background.prompt, background.sampler) == ("a table, an apple", "Euler a")
    assert (background.scheduler, background.layerdiffuse_stop_at) == ("Normal", 0.5)
    assert {image.role for image in background.inputs} == {"foreground", "blended"}
    chosen = job_of(sampler_name="Euler Karras", layerdiffuse_stop_at=0.9).spec.requests[2]
    assert (chosen.sampler, chosen.scheduler, chosen.layerdiffuse_stop_at) == (
        "Euler",
        "Karras",
        0.9,
    )


def test_later_stages_have_no_second_pass():
    spec = job_of().spec
    large = spec.generation.model_copy(
        update={"hires_scale": 2.0, "hires_width": 128, "hires_height": 128}
    )
    first, *later = spec.model_copy(update={"generation": large}).requests
    assert first.uses_hires
    assert not any(one.uses_hires for one in later)


def test_cost_and_pixels_count_all_stages():
    alone, chain = job_of(want="foreground"), job_of()
    assert chain.spec.cost > 2.5 * alone.spec.cost
    with pytest.raises(InvalidRequest, match="12,288 pixels in all"):
        chain.spec.check_pixels(64 * 64)
    alone.spec.check_pixels(64 * 64)
    assert chain.batch_key is None
    assert alone.batch_key is not None


def test_chain_stores_all_layers_bottom_to_top(storage: ObjectStorage, tmp_path: Path):
    engine, reports = Recording(), list[JobProgress]()
    job = job_of(seed=7, background_prompt="a table")
    result = Renderer(engine, storage, lambda _job, progress: reports.append(progress)).run(job)
    roles = ["background", "foreground", "blended", "composite"]
    assert [image.role for image in result.images] == roles
    assert [image.key for image in result.images] == [job.file_name(i) for i in range(4)]
    assert [image.is_opaque for image in result.images] == [True, False, True, True]
    files = {image.role: read(storage, tmp_path, image.key) for image in result.images}
    modes = [call[0].request.mode for call in engine.calls]
    assert modes == ["attention", "fg2ble", "fgble2bg"]
    last = engine.calls[2][0]
    assert list(last.inputs) == ["foreground", "blended"]
    for role, pixels in last.inputs.items():
        np.testing.assert_array_equal(pixels, files[role][0])
    np.testing.assert_array_equal(
        files["composite"][0], composite_layers([files["background"][0], files["foreground"][0]])
    )
    texts = {role: read_parameters(text or "") for role, (_, text) in files.items()}
    assert texts["background"]["Prompt"] == "a table, an apple"
    assert texts["background"]["Sampler"] == "Euler a"
    assert texts["background"]["layerdiffusion_method"] == MODES["fgble2bg"].label
    assert texts["foreground"]["Prompt"] == "an apple"
    assert texts["composite"]["Prompt"] == ""
    steps = [one.step for one in reports if one.stage == "sample"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {one.steps for one in reports if one.stage == "sample"} == {6}


def test_given_layers_are_stored_fitted_to_the_canvas(storage: ObjectStorage, tmp_path: Path):
    wide = noise(1, size=(128, 64))
    engine = Recording()
    job = job_of({"foreground": upload(storage, wide)}, foreground="x")
    result = Renderer(engine, storage).run(job)
    stored = {image.role: read(storage, tmp_path, image.key)[0] for image in result.images}
    assert list(stored) == ["background", "foreground", "blended", "composite"]
    np.testing.assert_array_equal(
        stored["foreground"], fit_layer(wide, (64, 64), "Crop and Resize")
    )
    # the engine fits the upload itself
    np.testing.assert_array_equal(engine.calls[1][0].inputs["foreground"], wide)


def test_fitted_layer_has_no_colour_of_transparent_pixels():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (255, 0, 0, 255)
    rgba[:, 4:] = (0, 255, 0, 0)
    fitted = fit_layer(rgba, (3, 3), "Just Resize")
    assert set(fitted[fitted[..., 3] > 0][:, 0]) == {255}
    assert not fitted[..., 1].any()


def test_each_set_has_layers_of_its_own(storage: ObjectStorage):
    engine = Recording()
    job = job_of(batch_size=2, n_iter=2, seed=3)
    result = Renderer(engine, storage).run(job)
    assert [image.seed for image in result.images] == [3] * 4 + [4] * 4 + [5] * 4 + [6] * 4
    for stage in (1, 2, 4, 5):
        assert [task.images[0].seed for task in engine.calls[stage]] in ([3, 4], [5, 6])
    first, second = engine.calls[1]
    assert not np.array_equal(first.inputs["foreground"], second.inputs["foreground"])


def test_chain_is_cancelled_between_its_stages(storage: ObjectStorage, tmp_path: Path):
    engine = Recording()
    renderer = Renderer(engine, storage, is_cancelled=lambda _job: len(engine.calls) == 1)
    # the fake engine makes no step, so that only the renderer can notice
    with pytest.raises(Cancelled):
        renderer.run(job_of())
    assert len(engine.calls) == 1
    assert not list(tmp_path.glob("alpha_*"))


def test_later_stage_without_memory_is_generated_set_by_set(storage: ObjectStorage):
    class Small(Recording):
        def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
            if len(tasks) > 1:
                self.calls.append([])
                raise OutOfMemory("too many images.")
            return super().render(tasks)

    engine = Small()
    job = job_of(batch_size=2, seed=3)
    result = Renderer(engine, storage).run(job)
    assert [len(tasks) for tasks in engine.calls] == [1, 0, 1, 1, 0, 1, 1]
    plain = Renderer(Recording(), storage).run(job)
    assert [image.seed for image in result.images] == [image.seed for image in plain.images]


def test_input_that_vanishes_after_the_work_is_not_read_again(
    storage: ObjectStorage, tmp_path: Path
):
    image = upload(storage, noise(0))
    job = job_of({"foreground": image})
    renderer = Renderer(Recording(), storage)
    (generated,) = renderer.generate([job])
    (tmp_path / image.file_name).unlink()
    assert [stored.role for stored in renderer.store(job, generated).images] == list(STACK)


def test_chain_that_ends_half_way_is_stored_once(storage: ObjectStorage, tmp_path: Path):
    class Killed(Exception):
        pass

    class Dying(ObjectStorage):
        left = 2

        def put(self, key: str, data: bytes, **options) -> None:
            if key.startswith("alpha_"):
                if self.left == 0:
                    raise Killed
                self.left -= 1
            super().put(key, data, **options)

    job = job_of()
    with pytest.raises(Killed):
        Renderer(Recording(), Dying(storage._store, str(tmp_path))).run(job)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("alpha_*")}
    assert len(first) == 2
    again = job.model_copy(update={"starts": 1})
    result = Renderer(Recording(), storage).run(again)
    stored = {path.name: path.read_bytes() for path in tmp_path.glob("alpha_*")}
    assert sorted(stored) == sorted(image.key for image in result.images)
    assert len(stored) == 4
    assert first.items() <= stored.items()


def test_warnings_of_all_stages_are_kept_once(storage: ObjectStorage):
    engine = FakeEngine(warnings=["a LoRA was ignored."])
    job = job_of(background_prompt="a <huge:1> table")
    result = Renderer(engine, storage).run(job)
    assert result.warnings.count("a LoRA was ignored.") == 1
    assert any("<huge:1>" in warning for warning in result.warnings)


def test_prompt_of_a_layer_that_is_not_generated_is_a_warning():
    warnings = job_of(want="blended", background_prompt="x", blended_prompt="y")
    assert warnings.spec.generation.warnings == (
        "background_prompt: ignored, because no background is generated.",
    )


def test_sets_of_layers_have_a_limit():
    with pytest.raises(InvalidRequest) as caught:
        job_of(n_iter=16, batch_size=8)
    assert caught.value.field == "iterations"
    assert "at most 64" in caught.value.message


def test_limits_count_sets_of_shared_attention():
    spec = job_of(steps=1).spec
    for sets, field in ((1, "width"), (2, "batch_size")):
        generation = spec.generation.model_copy(
            update={"mode": "sd15_joint", "batch_size": 3 * sets}
        )
        joint = JobSpec(generation=generation, stores_layers=True)
        for check in (joint.check_pixels, joint.check_cost):
            with pytest.raises(InvalidRequest) as caught:
                check(1e-9)  # type: ignore[arg-type]
            assert caught.value.field == field


def test_missing_layer_is_named_by_its_field(storage: ObjectStorage):
    image = StoredInput(f"input_{'0' * 64}.png", 64, 64, is_opaque=False, content_digest="")
    job = job_of({"background": image}, background="x")
    with pytest.raises(FileMissing) as caught:
        Renderer(FakeEngine(), storage).run(job)
    assert caught.value.field == "background"
    names = {"init": "image", "background": "background"}
    assert {role: FIELDS.get(role, role) for role in names} == names
    wrong = Job.new(job.spec).model_copy(
        update={"error": InvalidRequest("x", field="mode").to_dict()}
    )
    problem = _problem(wrong)
    assert problem
    assert problem.field == "want"


def test_opaque_foreground_is_refused(storage: ObjectStorage):
    with pytest.raises(InvalidRequest, match="foreground: the foreground is opaque"):
        job_of({"foreground": upload(storage, noise(1, opaque=True))}, foreground="x")


@pytest.mark.parametrize(
    ("fields", "image", "size"),
    [
        ({}, (4096, 2048), (2048, 1024)),
        ({}, (16_000, 10), (2048, 64)),
        ({"width": 128}, (64, 200), (128, 400)),
        ({"height": 128}, (200, 100), (256, 128)),
        ({"height": 2048}, (200, 100), (2048, 2048)),
        ({"width": 100, "height": 300}, (64, 64), (100, 300)),
    ],
)
def test_open_side_follows_from_the_image(
    fields: dict[str, int], image: tuple[int, int], size: tuple[int, int]
):
    body = LayersRequest(prompt="x", **fields)
    assert body.size_for(StoredInput("", *image, is_opaque=False, content_digest="")) == size


def test_size_follows_the_given_layer(storage: ObjectStorage):
    image = upload(storage, noise(1, size=(96, 72)))
    job = job_of({"foreground": image}, foreground="x", width=None, height=None)
    assert job.spec.generation.size == (96, 72)
    assert job.spec.generation.inputs == (image.as_role("foreground"),)
