"""Python client of the service: `Client`, and `AsyncClient` with the same methods as coroutines.

    from alphalayer.client import Client

    with Client("http://localhost:7861") as client:
        (image,) = client.generate("an apple, high quality", seed=7)
        Path("apple.png").write_bytes(image)
        (ripe,) = client.img2img("a ripe apple", image, strength=0.5)

The fields of a request are those of `POST /alpha/v1/jobs`, `/jobs/img2img` and `/jobs/layers`.
Images are files as bytes, or names of stored images.
Errors of the service are raised as the classes of `alphalayer.core.errors`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from alphalayer.core.errors import AlphalayerError, Cancelled, CommandHint, FileMissing

BASE_URL = "http://localhost:7861"
TIMEOUT_S = 60.0
"""Timeout of a request. Events of a waiting job come more often."""
JOBS = "/alpha/v1/jobs"
JobKind = Literal["txt2img", "img2img", "layers"]
"""What a job generates, and the end of its path."""
RETRY_TIMEOUT_S = 120.0
"""Default time without a response. It covers a restart: `drain_s` (60) of shutdown and a start."""
PAUSES_S = (0.2, 1.0, 3.0, 5.0, 10.0)
"""Pauses before retries. The last one repeats."""
UNAVAILABLE = (502, 503, 504)
"""Status codes of a proxy whose service does not run."""
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
MISSING = (403, 404)
"""Status codes of a bucket for a missing file."""
FOREIGN_ERRORS = (ValueError, KeyError, TypeError, AttributeError)
"""Exceptions while reading a response that is not one of the service."""
T = TypeVar("T")
_WHERE = CommandHint("Check the address, and that the service runs:", "serve")


class ServiceUnreachable(AlphalayerError):
    """No response from the address, or a response that is not from Alphalayer."""

    code = "unreachable"


@dataclass(frozen=True)
class ImageInfo:
    """A generated image: its URL, seed, and size in pixels."""

    url: str
    filename: str
    seed: int
    width: int
    height: int
    role: str = "image"
    """What a layer is: background, foreground, blended or composite. "image" is one alone."""


@dataclass(frozen=True)
class JobStatus:
    """Status of a job."""

    id: str
    state: str
    position: int
    """Position in the queue from 1. It is 0 if the job is not in the queue."""
    stage: str
    step: int
    steps: int
    eta_s: float | None
    """Estimated seconds until the job is done, if known."""
    preview_url: str | None
    created_at: float
    """Unix time in seconds."""
    images: tuple[ImageInfo, ...]
    warnings: tuple[str, ...]
    """What of the request was ignored."""
    error: AlphalayerError | None
    documents: tuple[dict[str, str], ...] = ()
    """URLs of files with all layers of each set, by format: psd, ora, tiff and zip."""

    @property
    def is_finished(self) -> bool:
        """Return whether the job is in a final state."""
        return self.state in ("done", "failed", "cancelled")

    @classmethod
    def read(cls, body: dict[str, Any]) -> JobStatus:
        """Read the status from the JSON of the service."""
        names = ("id", "state", "position", "stage", "step", "steps", "created_at")
        images = [
            ImageInfo(
                **{name: image[name] for name in ImageInfo.__dataclass_fields__ if name in image}
            )
            for image in body["images"]
        ]
        return cls(
            **{name: body[name] for name in names},
            eta_s=body.get("eta_s"),
            preview_url=body.get("preview_url"),
            images=tuple(images),
            warnings=tuple(body.get("warnings", ())),
            error=_read_error(body["error"]) if body.get("error") else None,
            documents=tuple(body.get("documents", ())),
        )

    def check(self) -> JobStatus:
        """Return the job itself if it is done.

        Raises:
            AlphalayerError: The job failed or was cancelled.
        """
        if self.state == "done":
            return self
        raise self.error or Cancelled(f"job {self.id} was cancelled.")


OnChange = Callable[[JobStatus], None]
"""Function that is called at every change of a job."""
ImageFile = bytes | Path | str
"""An image of a request: a PNG, WebP, AVIF or JPEG file, its path, or a stored image's name."""


class _Retry:
    """Retries of one request while the service does not respond.

    A new request is retried only if the service could be reached at first.
    """

    def __init__(self, url: str, seconds: float, *, is_new: bool):
        self._url = url
        self._seconds = seconds
        self._is_new = is_new
        self._failures = 0
        self._end = 0.0

    def reset(self) -> None:
        """Start over after a response."""
        self._failures = 0

    def next_pause_s(self, error: httpx.TransportError) -> float:
        """Return the seconds to wait before the next retry.

        Raises:
            ServiceUnreachable: There is no further retry.
        """
        self._failures += 1
        if self._failures == 1:
            self._end = time.monotonic() + self._seconds
        is_refused = self._is_new and self._failures == 1 and isinstance(error, NOT_SENT)
        is_final = is_refused or isinstance(error, httpx.UnsupportedProtocol)
        pause = PAUSES_S[min(self._failures, len(PAUSES_S)) - 1]
        if is_final or time.monotonic() + pause > self._end:
            raise ServiceUnreachable(
                f"{self._url} does not answer: {error}.", hint=_WHERE
            ) from error
        return pause


class _Protocol:
    """Requests and the interpretation of responses, shared by both clients."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        headers: Mapping[str, str] | None,
        retry_timeout_s: float,
    ):
        self.base_url = base_url.rstrip("/")
        self._retry_timeout_s = retry_timeout_s
        self._headers = {
            **(headers or {}),
            **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        }

    def request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Return the httpx arguments of a request to the service."""
        headers = {**self._headers, **options.pop("headers", {})}
        return {"method": method, "url": f"{self.base_url}{path}", "headers": headers, **options}

    def submit(
        self, kind: JobKind, idempotency_key: str | None, fields: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the request for a new job. The idempotency key makes retries safe.

        It is a form if a field is a file.
        """
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(12)}
        path = JOBS if kind == "txt2img" else f"{JOBS}/{kind}"
        fields = {
            name: value.read_bytes() if isinstance(value, Path) else value
            for name, value in fields.items()
        }
        files = {name: value for name, value in fields.items() if isinstance(value, bytes)}
        if not files:
            return self.request("POST", path, json=fields, headers=headers)
        data = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in fields.items()
            if name not in files and value is not None
        }
        return self.request("POST", path, data=data, files=files, headers=headers)

    def list(self, query: dict[str, Any]) -> dict[str, Any]:
        """Return the request for a list of jobs, without parameters that are None."""
        params = {name: value for name, value in query.items() if value is not None}
        return self.request("GET", JOBS, params=params)

    def withdraw(self, job_id: str) -> dict[str, Any]:
        """Return the request that withdraws the client's own submission of a job."""
        return self.request("DELETE", f"{JOBS}/{job_id}", params={"leave": True})

    def file(self, image: ImageInfo | str) -> dict[str, Any]:
        """Return the request for a file.

        It has no API key: a file needs none, and a redirect may lead to a bucket.
        """
        url = image if isinstance(image, str) else image.url
        return {"method": "GET", "url": url, "follow_redirects": True}

    def check(self, response: httpx.Response) -> httpx.Response:
        """Return a successful response. Its body must be loaded.

        Raises:
            AlphalayerError: The service reports an error.
            ServiceUnreachable: The response is not one of the service.
            httpx.RemoteProtocolError: A proxy reports that the service does not run.
        """
        if response.is_success:
            return response
        try:
            raise _read_error(response.json())
        except FOREIGN_ERRORS:
            error = _foreign_response(response, response.text)
            if response.status_code in UNAVAILABLE:
                raise httpx.RemoteProtocolError(error.message) from None
            if response.status_code in MISSING and JOBS not in response.url.path:
                url = response.url.copy_with(query=None)
                raise FileMissing(f"no image is at {url}.") from None
            raise error from None

    def retry(self, request: dict[str, Any], *, is_new: bool = False) -> _Retry:
        """Return the retries of a request.

        Args:
            request: The request, from another method.
            is_new: Whether the request does not refer to a job of the service.
        """
        return _Retry(request["url"], self._retry_timeout_s, is_new=is_new)


class Client:
    """Client of one service.

    It waits for a submitted job across a restart of the service.
    A new request fails immediately if the service cannot be reached.

    Args:
        base_url: URL of the service.
        api_key: API key, if the service requires one.
        headers: Headers of every request to the service, except for files.
        http: An `httpx.Client` of your own, for instance with proxies and certificates.
        retry_timeout_s: Maximum time without a response, in seconds.
    """

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        http: httpx.Client | None = None,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
    ):
        self._protocol = _Protocol(base_url, api_key, headers, retry_timeout_s)
        self._http = http or httpx.Client(timeout=TIMEOUT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    @property
    def base_url(self) -> str:
        """Return the URL of the service, without a final slash."""
        return self._protocol.base_url

    def generate(
        self, prompt: str, *, on_change: OnChange = lambda _: None, **fields: Any
    ) -> list[bytes]:
        """Generate images and return their files.

        Args:
            prompt: Description of the image.
            on_change: Called at every change of the job.
            **fields: Further fields of the request.

        Raises:
            AlphalayerError: The request is refused, or the job failed or was cancelled.
        """
        status = self._finish("txt2img", on_change, {"prompt": prompt, **fields})
        return [self.download(image) for image in status.images]

    def img2img(
        self,
        prompt: str,
        image: ImageFile,
        mask: ImageFile | None = None,
        *,
        on_change: OnChange = lambda _: None,
        **fields: Any,
    ) -> list[bytes]:
        """Change an image and return the files of the results.

        Args:
            prompt: Description of the result.
            image: Image to change.
            mask: Mask that is white where the image is changed. Default: everywhere.
            on_change: Called at every change of the job.
            **fields: Further fields of the request, such as `strength`.

        Raises:
            AlphalayerError: The request is refused, or the job failed or was cancelled.
        """
        sent = {"prompt": prompt, "image": image, "mask": mask, **fields}
        status = self._finish("img2img", on_change, sent)
        return [self.download(image) for image in status.images]

    def layers(
        self, prompt: str, *, on_change: OnChange = lambda _: None, **fields: Any
    ) -> dict[str, bytes]:
        """Generate layers and return the files of the first set by role, bottom to top.

        Args:
            prompt: Description of the whole image.
            on_change: Called at every change of the job.
            **fields: Further fields of the request, such as `want`, `foreground` and `background`.

        Raises:
            AlphalayerError: The request is refused, or the job failed or was cancelled.
        """
        status = self._finish("layers", on_change, {"prompt": prompt, **fields})
        files: dict[str, bytes] = {}
        for layer in status.images:
            if layer.role in files:
                break
            files[layer.role] = self.download(layer)
        return files

    def submit(
        self,
        prompt: str,
        *,
        kind: JobKind = "txt2img",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> JobStatus:
        """Submit a job. The same idempotency key returns the same job again.

        Args:
            prompt: Description of the image.
            kind: What to generate.
            idempotency_key: Key of the request. Default: a random one.
            **fields: Further fields of the request.

        Raises:
            AlphalayerError: The request is refused, for instance `QueueFull`, `InvalidRequest`.
        """
        request = self._protocol.submit(kind, idempotency_key, {"prompt": prompt, **fields})
        return _read(self._send(request, is_new=True), JobStatus.read)

    def get(self, job_id: str) -> JobStatus:
        """Return the status of a job.

        Raises:
            JobMissing: There is no such job.
        """
        request = self._protocol.request("GET", f"{JOBS}/{job_id}")
        return _read(self._send(request), JobStatus.read)

    def list(self, **query: Any) -> Sequence[JobStatus]:
        """List the client's jobs, newest first.

        Args:
            **query: `state`, `limit`, or `before` (only jobs created before this time).
        """
        return _read(self._send(self._protocol.list(query), is_new=True), _read_list)

    def cancel(self, job_id: str) -> JobStatus:
        """Stop a job.

        Raises:
            JobMissing: There is no such job.
        """
        request = self._protocol.request("DELETE", f"{JOBS}/{job_id}")
        return _read(self._send(request), JobStatus.read)

    def withdraw(self, job_id: str) -> JobStatus:
        """Withdraw one submission of a job.

        The job stops unless another client submitted it, too, with the same idempotency key.

        Raises:
            JobMissing: There is no such job.
        """
        return _read(self._send(self._protocol.withdraw(job_id)), JobStatus.read)

    def events(self, job_id: str) -> Iterator[JobStatus]:
        """Yield every change of a job until it is finished, also across a restart."""
        request = self._protocol.request("GET", f"{JOBS}/{job_id}/events")
        retry = self._protocol.retry(request)
        while True:
            try:
                with self._http.stream(**request) as response:
                    if response.is_error:
                        response.read()
                    for line in self._protocol.check(response).iter_lines():
                        if status := _read_event(response, line):
                            retry.reset()
                            yield status
                            if status.is_finished:
                                return
                raise httpx.RemoteProtocolError("the events ended before the job")
            except httpx.TransportError as error:
                time.sleep(retry.next_pause_s(error))

    def download(self, image: ImageInfo | str) -> bytes:
        """Return the file of an image, or of its URL."""
        return self._send(self._protocol.file(image)).content

    def _finish(self, kind: JobKind, on_change: OnChange, fields: dict[str, Any]) -> JobStatus:
        """Submit a job and wait until it is done. Raises its error."""
        status = self.submit(**fields, kind=kind)
        for change in self.events(status.id):
            on_change(status := change)
        return status.check()

    def _send(self, request: dict[str, Any], *, is_new: bool = False) -> httpx.Response:
        retry = self._protocol.retry(request, is_new=is_new)
        while True:
            try:
                return self._protocol.check(self._http.request(**request))
            except httpx.TransportError as error:
                time.sleep(retry.next_pause_s(error))


class AsyncClient:
    """Client with the methods of `Client` as coroutines."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        http: httpx.AsyncClient | None = None,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
    ):
        self._protocol = _Protocol(base_url, api_key, headers, retry_timeout_s)
        self._http = http or httpx.AsyncClient(timeout=TIMEOUT_S)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    @property
    def base_url(self) -> str:
        """Return the URL of the service, without a final slash."""
        return self._protocol.base_url

    async def generate(
        self, prompt: str, *, on_change: OnChange = lambda _: None, **fields: Any
    ) -> list[bytes]:
        """Generate images and return their files. See `Client.generate`."""
        status = await self._finish("txt2img", on_change, {"prompt": prompt, **fields})
        return [await self.download(image) for image in status.images]

    async def img2img(
        self,
        prompt: str,
        image: ImageFile,
        mask: ImageFile | None = None,
        *,
        on_change: OnChange = lambda _: None,
        **fields: Any,
    ) -> list[bytes]:
        """Change an image and return the files of the results. See `Client.img2img`."""
        sent = {"prompt": prompt, "image": image, "mask": mask, **fields}
        status = await self._finish("img2img", on_change, sent)
        return [await self.download(image) for image in status.images]

    async def layers(
        self, prompt: str, *, on_change: OnChange = lambda _: None, **fields: Any
    ) -> dict[str, bytes]:
        """Generate layers and return their files by role. See `Client.layers`."""
        status = await self._finish("layers", on_change, {"prompt": prompt, **fields})
        files: dict[str, bytes] = {}
        for layer in status.images:
            if layer.role in files:
                break
            files[layer.role] = await self.download(layer)
        return files

    async def submit(
        self,
        prompt: str,
        *,
        kind: JobKind = "txt2img",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> JobStatus:
        """Submit a job. See `Client.submit`."""
        request = self._protocol.submit(kind, idempotency_key, {"prompt": prompt, **fields})
        return _read(await self._send(request, is_new=True), JobStatus.read)

    async def get(self, job_id: str) -> JobStatus:
        """Return the status of a job. See `Client.get`."""
        request = self._protocol.request("GET", f"{JOBS}/{job_id}")
        return _read(await self._send(request), JobStatus.read)

    async def list(self, **query: Any) -> Sequence[JobStatus]:
        """List the client's jobs. See `Client.list`."""
        return _read(await self._send(self._protocol.list(query), is_new=True), _read_list)

    async def cancel(self, job_id: str) -> JobStatus:
        """Stop a job. See `Client.cancel`."""
        request = self._protocol.request("DELETE", f"{JOBS}/{job_id}")
        return _read(await self._send(request), JobStatus.read)

    async def withdraw(self, job_id: str) -> JobStatus:
        """Withdraw one submission of a job. See `Client.withdraw`."""
        return _read(await self._send(self._protocol.withdraw(job_id)), JobStatus.read)

    async def events(self, job_id: str) -> AsyncIterator[JobStatus]:
        """Yield every change of a job until it is finished. See `Client.events`."""
        request = self._protocol.request("GET", f"{JOBS}/{job_id}/events")
        retry = self._protocol.retry(request)
        while True:
            try:
                async with self._http.stream(**request) as response:
                    if response.is_error:
                        await response.aread()
                    async for line in self._protocol.check(response).aiter_lines():
                        if status := _read_event(response, line):
                            retry.reset()
                            yield status
                            if status.is_finished:
                                return
                raise httpx.RemoteProtocolError("the events ended before the job")
            except httpx.TransportError as error:
                await asyncio.sleep(retry.next_pause_s(error))

    async def download(self, image: ImageInfo | str) -> bytes:
        """Return the file of an image, or of its URL."""
        return (await self._send(self._protocol.file(image))).content

    async def _finish(
        self, kind: JobKind, on_change: OnChange, fields: dict[str, Any]
    ) -> JobStatus:
        """Submit a job and wait until it is done. Raises its error."""
        status = await self.submit(**fields, kind=kind)
        async for change in self.events(status.id):
            on_change(status := change)
        return status.check()

    async def _send(self, request: dict[str, Any], *, is_new: bool = False) -> httpx.Response:
        retry = self._protocol.retry(request, is_new=is_new)
        while True:
            try:
                return self._protocol.check(await self._http.request(**request))
            except httpx.TransportError as error:
                await asyncio.sleep(retry.next_pause_s(error))


def _read(response: httpx.Response, read: Callable[[Any], T]) -> T:
    """Read the JSON of a response.

    Raises:
        ServiceUnreachable: The response is not one of the service.
    """
    try:
        return read(response.json())
    except FOREIGN_ERRORS:
        raise _foreign_response(response, response.text) from None


def _read_list(body: dict[str, Any]) -> list[JobStatus]:
    return [JobStatus.read(job) for job in body["jobs"]]


def _read_event(response: httpx.Response, line: str) -> JobStatus | None:
    """Read the job in a line of server-sent events, or return None if it has none.

    Raises:
        ServiceUnreachable: The line is not one of the service.
    """
    if not line or line.startswith((":", "event:", "id:", "retry:")):
        return None
    try:
        return JobStatus.read(json.loads(line.removeprefix("data:")))
    except FOREIGN_ERRORS:
        raise _foreign_response(response, line) from None


def _foreign_response(response: httpx.Response, text: str) -> ServiceUnreachable:
    """Return the error for a response that is not one of the service."""
    return ServiceUnreachable(
        f"{response.url} answered {response.status_code}: {text.strip()[:200]}", hint=_WHERE
    )


def _read_error(body: dict[str, Any]) -> AlphalayerError:
    """Read the error in problem details, whose `detail` begins with the field."""
    field = body.get("field")
    message = body["detail"].removeprefix(f"{field}: ") if field else body["detail"]
    return AlphalayerError.from_dict(
        {"code": body["code"], "message": message, "hint": body.get("hint", ""), "field": field}
    )
