"""The one render path and the messages around it, with engines that generate discs."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from alphalayer.core.errors import (
    AlphalayerError,
    Cancelled,
    EngineFailed,
    FileMissing,
    InvalidRequest,
    OutOfMemory,
    StorageFailed,
)
from alphalayer.core.job import (
    MAX_ITERATIONS,
    Delivery,
    ImageRef,
    Job,
    JobProgress,
    JobResult,
    JobSpec,
    Output,
    Submission,
    Webhook,
)
from alphalayer.core.modes import MODES
from alphalayer.core.prompts import MAX_LORAS, MAX_PROMPT_BYTES
from alphalayer.core.request import MAX_SEED, GenerationRequest, ImageInput, ModelDefaults
from alphalayer.engine.base import GenerationResult, RenderTask, RgbaImage
from alphalayer.engine.fake import FakeEngine, render_disc
from alphalayer.images import codecs
from alphalayer.images.infotext import read_parameters
from alphalayer.storage.objects import ObjectStorage, open_storage
from alphalayer.worker import messages
from alphalayer.worker.batching import MAX_BATCH_JOBS
from alphalayer.worker.messages import (
    Cancel,
    Done,
    Failed,
    Open,
    ProgressReport,
    Ready,
    Render,
    Started,
    Stopped,
    is_too_long,
    read_command,
    read_open,
    read_report,
    write_message,
    write_report,
)
from alphalayer.worker.render import Renderer, to_public_error


def _job(*, output: Output = Output(), iterations: int = 1, previews: bool = False, **fields):
    request = GenerationRequest.model_validate(
        {"prompt": "an apple", "width": 64, "height": 64, "steps": 2, **fields}
    )
    return Job.new(
        JobSpec(generation=request, output=output, iterations=iterations, previews=previews)
    )


@pytest.fixture
def storage(tmp_path: Path) -> ObjectStorage:
    return open_storage(str(tmp_path))


class Recording(FakeEngine):
    """A fake engine that keeps the tasks of each call."""

    def __init__(self):
        super().__init__()
        self.calls: list[list[RenderTask]] = []

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        self.calls.append(list(tasks))
        return super().render(tasks)


def _store_input(storage: ObjectStorage, rgba: RgbaImage) -> str:
    data = codecs.encode(rgba)
    name = f"input_{hashlib.sha256(data).hexdigest()}.png"
    storage.put(name, data)
    return name


def test_iterations_are_stored_under_the_names_of_the_job(storage: ObjectStorage, tmp_path: Path):
    engine, reports = Recording(), list[JobProgress]()
    job = _job(batch_size=2, iterations=2, seed=7)
    result = Renderer(engine, storage, lambda _job, progress: reports.append(progress)).run(job)
    assert [[len(call), call[0].images[0].seed] for call in engine.calls] == [[1, 7], [1, 9]]
    assert [image.key for image in result.images] == [job.file_name(i) for i in range(4)]
    assert [image.seed for image in result.images] == [7, 8, 9, 10]
    for image in result.images:
        data = (tmp_path / image.key).read_bytes()
        rgba, parameters = codecs.decode(data)
        np.testing.assert_array_equal(rgba, render_disc("an apple", image.seed, 64, 64))
        assert read_parameters(parameters or "")["Seed"] == str(image.seed)
        assert (image.width, image.height, image.size_bytes) == (64, 64, len(data))
    assert (result.model_name, result.settings.steps) == ("fake", 2)
    assert list(result.seconds) == ["sample", "store"]
    assert result.seconds["store"] > 0
    steps = [(progress.step, progress.steps) for progress in reports if progress.stage == "sample"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert reports[-1].stage == "store"


def test_output_options_are_applied(storage: ObjectStorage, tmp_path: Path):
    output = Output(format="webp", trim=True, trim_threshold=254, background="#ff0000")
    (image,) = Renderer(FakeEngine(), storage).run(_job(output=output)).images
    assert image.key.endswith(".webp")
    assert image.width < 64
    rgba, _ = codecs.decode((tmp_path / image.key).read_bytes())
    assert rgba.shape == (image.height, image.width, 4)
    assert (rgba[..., 3] == 255).all()


def test_compatible_jobs_are_generated_in_one_call(storage: ObjectStorage):
    engine = Recording()
    jobs = [_job(seed=1), _job(prompt="a pear", seed=5, batch_size=2)]
    results = Renderer(engine, storage).generate(jobs)
    assert [len(call) for call in engine.calls] == [2]
    seeds = [[one.seed for one in generated.results[0].images] for generated in results]
    assert seeds == [[1], [5, 6]]


def test_input_images_reach_the_engine(storage: ObjectStorage):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 4), np.uint8)
    name = _store_input(storage, pixels)
    engine = Recording()
    inputs = [{"role": "background", "file_name": name}]
    job = _job(mode="bg2ble", inputs=inputs, iterations=2)
    Renderer(engine, storage).run(job)
    for (task,) in engine.calls:
        assert list(task.inputs) == ["background"]
        assert task.inputs["background"].dtype == np.uint8
        np.testing.assert_array_equal(task.inputs["background"], pixels)
    Renderer(engine, storage).run(_job())
    assert engine.calls[-1][0].inputs == {}


def test_missing_input_image_is_named(storage: ObjectStorage):
    name = f"input_{'0' * 64}.png"
    job = _job(mode="fg2ble", inputs=[ImageInput(role="foreground", file_name=name)])
    with pytest.raises(
        FileMissing, match=f'foreground: there is no input image "{name}"'
    ) as caught:
        Renderer(FakeEngine(), storage).run(job)
    assert caught.value.hint == "Upload it again."


def test_previews_are_stored_and_replaced(storage: ObjectStorage, tmp_path: Path):
    reports: list[JobProgress] = []
    job = _job(previews=True)
    Renderer(FakeEngine(), storage, lambda _job, progress: reports.append(progress)).run(job)
    assert [progress.preview for progress in reports] == [job.preview_name] * 2 + [None]
    assert codecs.decode((tmp_path / job.preview_name).read_bytes())[0].shape[:2] == (32, 32)


def test_full_disk_ends_a_job_at_its_image_only(tmp_path: Path):
    class Full(ObjectStorage):
        def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
            raise StorageFailed("the disk is full.")

    reports: list[JobProgress] = []
    storage = Full(open_storage(str(tmp_path))._store, str(tmp_path))
    renderer = Renderer(FakeEngine(), storage, lambda _job, progress: reports.append(progress))
    with pytest.raises(StorageFailed):
        renderer.run(_job(previews=True))
    assert [progress.preview for progress in reports] == [None] * 3


def test_cancelled_jobs_are_not_stored(storage: ObjectStorage, tmp_path: Path):
    cancelled: list[str] = []
    renderer = Renderer(FakeEngine(), storage, is_cancelled=lambda job: job.id in cancelled)
    stopped, finished = _job(), _job()
    results = renderer.generate([stopped, finished])
    cancelled.append(stopped.id)
    with pytest.raises(Cancelled):
        renderer.store(stopped, results[0])
    renderer.store(finished, results[1])
    assert [path.name for path in tmp_path.iterdir()] == [finished.file_name(0)]
    cancelled.append(finished.id)
    with pytest.raises(Cancelled):
        renderer.generate([stopped, finished])


def test_unexpected_errors_are_logged_and_public_ones_returned(
    caplog: pytest.LogCaptureFixture,
):
    expected = OutOfMemory("too large.")
    assert to_public_error(expected) is expected
    assert caplog.text == ""
    error = to_public_error(IndexError("x" * 1000))
    assert isinstance(error, EngineFailed)
    assert len(error.message) < 320
    assert "IndexError: xxx" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/srv/secret/a.safetensors"),
            "PermissionError: Permission denied",
        ),
        (FileNotFoundError("no such file: /srv/secret/a"), "FileNotFoundError"),
    ],
)
def test_paths_of_the_machine_are_logged_only(
    caplog: pytest.LogCaptureFixture, error: OSError, message: str
):
    assert to_public_error(error).message == message
    assert "/srv/secret" in caplog.text


def test_engine_process_receives_neither_client_nor_delivery():
    submission = Submission(owner="ann", idempotency_key="key-1", digest="0", traceparent="00-1")
    delivery = Delivery(webhook=Webhook(url="https://a.example/hook", service_url="http://b"))
    spec = JobSpec(generation=GenerationRequest(prompt="an apple"), iterations=2)
    job = Job.new(spec, submission, delivery).model_copy(update={"starts": 2})
    message = Render(jobs=(job,))
    assert message.jobs[0] is job, "validated by the reader only"
    line = write_message(message)
    assert set(json.loads(line)["jobs"][0]) == {"id", "created_at", "starts", "spec"}
    command = read_command(line)
    assert isinstance(command, Render)
    (received,) = command.jobs
    assert received == job.model_copy(update={"submission": Submission(), "delivery": Delivery()})
    assert received.file_name(0) == job.file_name(0)


def test_messages_arrive_as_they_were_sent(storage: ObjectStorage):
    opening = Open(name="cpu", engine="a:b", options={"x": 1}, storage="out", logs={})
    assert read_open(write_message(opening)) == opening
    assert read_command(write_message(Cancel(id="1"))) == Cancel(id="1")
    result = Renderer(FakeEngine(), storage).run(_job())
    for report in (
        Ready(batch_pixels=5, device="cpu"),
        Started(id="1"),
        ProgressReport(id="1", progress=JobProgress(stage="sample", step=1, steps=2)),
        Done(id="1", result=result, memory_bytes=7),
    ):
        line = write_message(report)
        assert line.count(b"\n") == 1
        assert read_report(line) == report


def _largest_job() -> Job:
    """Return a job whose fields are all at their limits, of characters that JSON escapes."""
    loras = [{"name": "\x01" * 200, "weight": -1.2345678901234567}] * MAX_LORAS
    roles = MODES["bgble2fg"].needs
    request = GenerationRequest.model_validate(
        {
            "prompt": "\x01" * MAX_PROMPT_BYTES,
            "negative_prompt": "\x01" * MAX_PROMPT_BYTES,
            "model": "\x01" * 500,
            "loras": loras,
            "seed": MAX_SEED,
            "subseed": MAX_SEED,
            "subseed_strength": 0.12345678901234567,
            "batch_size": 8,
            "mode": "bgble2fg",
            "inputs": [{"role": role, "file_name": f"input_{'f' * 64}.png"} for role in roles],
        }
    )
    output = Output(format="avif", background="#ffffff", trim_padding=1024)
    return Job.new(JobSpec(generation=request, iterations=MAX_ITERATIONS, output=output))


def test_batch_of_the_largest_requests_fits_into_a_line():
    job = _largest_job()
    one = write_message(Render.model_construct(jobs=(job,)))
    assert len(one) > 120_000, "both prompts escaped"
    batch = Render.model_construct(jobs=(job,) * MAX_BATCH_JOBS)
    assert not is_too_long(write_message(batch))
    command = read_command(one)
    assert isinstance(command, Render)
    assert command.jobs[0].spec == job.spec


def test_result_of_the_largest_request_fits_into_a_line():
    job = _largest_job()
    numbers = dict.fromkeys(("seed", "subseed", "width", "height", "size_bytes"), 2**63)
    images = tuple(
        ImageRef(key=job.file_name(i), role="foreground", **numbers)
        for i in range(len(job.spec.seeds))
    )
    assert len(images) == 8 * MAX_ITERATIONS
    names = {"model_name": "\x01" * 4096, "model_hash": "f" * 64}
    result = JobResult(images=images, settings=ModelDefaults(), **names)
    line = write_message(Done(id=job.id, result=result, memory_bytes=2**63))
    assert len(line) < 100_000, "the texts of the request are not part of the result"


def test_report_that_is_too_long_becomes_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "MAX_LINE_BYTES", 400)
    error = InvalidRequest("x" * 1000)
    for report, kind in (
        (Failed(id="1", error=error), Failed),
        (Stopped(error=error), Stopped),
    ):
        line = write_report(report)
        assert not is_too_long(line)
        received = read_report(line)
        assert isinstance(received, kind)
        assert received.error.code == "engine_failed"
        assert "at most 400" in received.error.message
    short = Started(id="1")
    assert read_report(write_report(short)) == short


@pytest.mark.parametrize("kind", [Failed, Stopped])
def test_errors_keep_class_and_fields(kind: type[Failed] | type[Stopped]):
    error: AlphalayerError = OutOfMemory("a \udc80 file.", hint="Try less.", field="width")
    message = Failed(id="1", error=error) if kind is Failed else Stopped(error=error)
    received = read_report(write_message(message))
    assert isinstance(received, (Failed, Stopped))
    assert isinstance(received.error, OutOfMemory)
    assert received.error.to_dict() == {**error.to_dict(), "message": "a ? file."}


@pytest.mark.parametrize(
    "line",
    [
        b"a print of a library\n",
        b"[]\n",
        b'{"kind": "unknown", "id": "1"}\n',
        b'{"kind": "started"}\n',
        b'{"kind": "failed", "id": "1", "error": {"code": "x"}}\n',
        b'{"kind": "done", "id": "1", "result": {"prompt": "a secret"}, "memory_bytes": 0}\n',
    ],
)
def test_other_lines_are_no_messages(line: bytes):
    with pytest.raises(ValueError, match="not a message: ") as caught:
        read_report(line)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
