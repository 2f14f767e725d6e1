"""The service from Python: `Client`, and `AsyncClient` with the same methods to be awaited.

    from alphalayer.client import Client

    with Client("http://localhost:7861") as client:
        (picture,) = client.generate("an apple, high quality", seed=7)
        Path("apple.png").write_bytes(picture)

Fields of a request are those of `POST /alpha/v1/jobs`. Errors of the service are those of `alphalayer.core.errors`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from alphalayer.core.errors import AlphalayerError, Cancelled, CommandHint, FileMissing

BASE_URL = "http://localhost:7861"
TIMEOUT_S = 60.0
"""How long the service may be silent; a job that waits tells so more often than that."""
JOBS = "/alpha/v1/jobs"
PATIENCE_S = 120.0
"""How long a job is waited for where the service is away: a stop (it listens no more while it ends what is at work, `drain_s`, 60) and a
start."""
PAUSES_S = (0.2, 1.0, 3.0, 5.0, 10.0)
"""Before each new try; the last one goes on."""
AWAY = (502, 503, 504)
"""What a proxy answers for a service that is not there."""
NOT_EVEN_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
GONE = (403, 404)
"""What a bucket answers for a file that it has not, or has no longer."""
NOT_OURS = (ValueError, KeyError, TypeError, AttributeError)
"""What reading an answer raises that is not the service's."""
T = TypeVar("T")
_WHERE = CommandHint("Check the address, and that the service runs:", "serve")


class ServiceUnreachable(AlphalayerError):
    """Nothing answers at the address, or what answers is no Alphalayer."""

    code = "unreachable"


@dataclass(frozen=True)
class Picture:
    """A finished picture, as the service names it; sides in pixels."""

    url: str
    filename: str
    seed: int
    width: int
    height: int


@dataclass(frozen=True)
class JobStatus:
    """How a job stands. `position` 1 is next, 0 is not in the queue; `eta_s` in seconds where it can be said; times are Unix seconds."""

    id: str
    state: str
    position: int
    stage: str
    step: int
    steps: int
    eta_s: float | None
    preview_url: str | None
    created_at: float
    pictures: tuple[Picture, ...]
    error: AlphalayerError | None

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("done", "failed", "cancelled")

    @classmethod
    def read(cls, answer: dict[str, Any]) -> JobStatus:
        """From the service's JSON."""
        names = ("id", "state", "position", "stage", "step", "steps", "created_at")
        pictures = [
            Picture(**{name: each[name] for name in Picture.__dataclass_fields__})
            for each in answer["images"]
        ]
        return cls(
            **{name: answer[name] for name in names},
            eta_s=answer.get("eta_s"),
            preview_url=answer.get("preview_url"),
            pictures=tuple(pictures),
            error=_problem(answer["error"]) if answer.get("error") else None,
        )

    def check(self) -> JobStatus:
        """The job itself, if it is done. Raises the error it ended with."""
        if self.state == "done":
            return self
        raise self.error or Cancelled(f"job {self.id} was cancelled.")


class _Patience:
    """What to do when nobody answers one call: try again for a while, but a new request only if the service was there."""

    def __init__(self, url: str, seconds: float, *, is_new: bool):
        self._url = url
        self._seconds = seconds
        self._is_new = is_new
        self._failures = 0
        self._end = 0.0

    def renew(self) -> None:
        """It was there."""
        self._failures = 0

    def pause_s(self, error: httpx.TransportError) -> float:
        """How long to wait before the next try, in seconds. Raises `ServiceUnreachable` instead of the last."""
        self._failures += 1
        if self._failures == 1:
            self._end = time.monotonic() + self._seconds
        is_absent = self._is_new and self._failures == 1 and isinstance(error, NOT_EVEN_SENT)
        is_hopeless = is_absent or isinstance(error, httpx.UnsupportedProtocol)
        pause = PAUSES_S[min(self._failures, len(PAUSES_S)) - 1]
        if is_hopeless or time.monotonic() + pause > self._end:
            raise ServiceUnreachable(
                f"{self._url} does not answer: {error}.", hint=_WHERE
            ) from error
        return pause


class _Calls:
    """What is said and how answers are understood, the same for both clients."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        headers: Mapping[str, str] | None,
        patience_s: float,
    ):
        self.base_url = base_url.rstrip("/")
        self._patience_s = patience_s
        self._headers = {
            **(headers or {}),
            **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        }

    def call(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """The arguments of a request to the service."""
        headers = {**self._headers, **more.pop("headers", {})}
        return {"method": method, "url": f"{self.base_url}{path}", "headers": headers, **more}

    def submit(
        self, prompt: str, idempotency_key: str | None, fields: dict[str, Any]
    ) -> dict[str, Any]:
        """A new job; the key makes it safe to send twice."""
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(12)}
        return self.call("POST", JOBS, json={"prompt": prompt, **fields}, headers=headers)

    def list(self, query: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a request for jobs; what is None is not asked for."""
        return self.call(
            "GET", JOBS, params={name: value for name, value in query.items() if value is not None}
        )

    def withdraw(self, job_id: str) -> dict[str, Any]:
        """One's own request for a job is taken back."""
        return self.call("DELETE", f"{JOBS}/{job_id}", params={"leave": True})

    def file(self, picture: Picture | str) -> dict[str, Any]:
        """The arguments of a request for a file: without our key, for a file needs none, and a redirect may lead to a bucket."""
        url = picture if isinstance(picture, str) else picture.url
        return {"method": "GET", "url": url, "follow_redirects": True}

    def check(self, response: httpx.Response) -> httpx.Response:
        """The response, if it is no error; it must have been read. Raises what a service that is away raises for a proxy's answer."""
        if response.is_success:
            return response
        try:
            raise _problem(response.json())
        except NOT_OURS:
            if response.status_code in AWAY:
                raise httpx.RemoteProtocolError(_foreign(response, response.text).message) from None
            if response.status_code in GONE and JOBS not in response.url.path:
                raise FileMissing(
                    f"no picture is at {response.url.copy_with(query=None)}."
                ) from None
            raise _foreign(response, response.text) from None

    def patience(self, call: dict[str, Any], *, is_new: bool = False) -> _Patience:
        """That of one call; of a new request, or one about a job that the service has."""
        return _Patience(call["url"], self._patience_s, is_new=is_new)


class Client:
    """One service. `headers` go with every call to it, and not with files; `http` may bring an `httpx.Client` of one's own, with its
    proxies and certificates.

    A job that was submitted is waited for across a restart of the service, up to `patience_s` seconds without an answer; a new
    request to where nobody is fails at once.
    """

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        http: httpx.Client | None = None,
        patience_s: float = PATIENCE_S,
    ):
        self._calls = _Calls(base_url, api_key, headers, patience_s)
        self._http = http or httpx.Client(timeout=TIMEOUT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    @property
    def base_url(self) -> str:
        """The service's address, without a slash at its end."""
        return self._calls.base_url

    def generate(
        self, prompt: str, *, on_change: Callable[[JobStatus], None] = lambda _: None, **fields: Any
    ) -> list[bytes]:
        """Draw, and bring the files; `on_change` is called at every change of the job. Raises what became of it."""
        status = self.submit(prompt, **fields)
        for change in self.events(status.id):
            on_change(status := change)
        return [self.download(each) for each in status.check().pictures]

    def submit(
        self, prompt: str, *, idempotency_key: str | None = None, **fields: Any
    ) -> JobStatus:
        """Put a job into the queue; the same key gives the same job again. Raises `QueueFull`, `InvalidRequest` and others."""
        return _read(
            self._send(self._calls.submit(prompt, idempotency_key, fields), is_new=True),
            JobStatus.read,
        )

    def get(self, job_id: str) -> JobStatus:
        """How a job stands. Raises `JobMissing`."""
        return _read(self._send(self._calls.call("GET", f"{JOBS}/{job_id}")), JobStatus.read)

    def list(self, **query: Any) -> Sequence[JobStatus]:
        """One's jobs, newest first; `state`, `limit`, `before` (created before this time)."""
        return _read(self._send(self._calls.list(query), is_new=True), _read_list)

    def cancel(self, job_id: str) -> JobStatus:
        """Stop a job. Raises `JobMissing`."""
        return _read(self._send(self._calls.call("DELETE", f"{JOBS}/{job_id}")), JobStatus.read)

    def withdraw(self, job_id: str) -> JobStatus:
        """Want a job no more: it stops, unless somebody else submitted it, too, with the same key. Raises `JobMissing`."""
        return _read(self._send(self._calls.withdraw(job_id)), JobStatus.read)

    def events(self, job_id: str) -> Iterator[JobStatus]:
        """Every change of a job until it is over; goes on where the service is away for a while."""
        call = self._calls.call("GET", f"{JOBS}/{job_id}/events")
        patience = self._calls.patience(call)
        while True:
            try:
                with self._http.stream(**call) as response:
                    if response.is_error:
                        response.read()
                    for line in self._calls.check(response).iter_lines():
                        if status := _event(response, line):
                            patience.renew()
                            yield status
                            if status.is_over:
                                return
                raise httpx.RemoteProtocolError("the events ended before the job")
            except httpx.TransportError as error:
                time.sleep(patience.pause_s(error))

    def download(self, picture: Picture | str) -> bytes:
        """The file of a picture, or of its URL."""
        return self._send(self._calls.file(picture)).content

    def _send(self, call: dict[str, Any], *, is_new: bool = False) -> httpx.Response:
        patience = self._calls.patience(call, is_new=is_new)
        while True:
            try:
                return self._calls.check(self._http.request(**call))
            except httpx.TransportError as error:
                time.sleep(patience.pause_s(error))


class AsyncClient:
    """`Client`, to be awaited."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        http: httpx.AsyncClient | None = None,
        patience_s: float = PATIENCE_S,
    ):
        self._calls = _Calls(base_url, api_key, headers, patience_s)
        self._http = http or httpx.AsyncClient(timeout=TIMEOUT_S)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    @property
    def base_url(self) -> str:
        """The service's address, without a slash at its end."""
        return self._calls.base_url

    async def generate(
        self, prompt: str, *, on_change: Callable[[JobStatus], None] = lambda _: None, **fields: Any
    ) -> list[bytes]:
        """See `Client.generate`."""
        status = await self.submit(prompt, **fields)
        async for change in self.events(status.id):
            on_change(status := change)
        return [await self.download(each) for each in status.check().pictures]

    async def submit(
        self, prompt: str, *, idempotency_key: str | None = None, **fields: Any
    ) -> JobStatus:
        """See `Client.submit`."""
        return _read(
            await self._send(self._calls.submit(prompt, idempotency_key, fields), is_new=True),
            JobStatus.read,
        )

    async def get(self, job_id: str) -> JobStatus:
        """See `Client.get`."""
        return _read(await self._send(self._calls.call("GET", f"{JOBS}/{job_id}")), JobStatus.read)

    async def list(self, **query: Any) -> Sequence[JobStatus]:
        """See `Client.list`."""
        return _read(await self._send(self._calls.list(query), is_new=True), _read_list)

    async def cancel(self, job_id: str) -> JobStatus:
        """See `Client.cancel`."""
        return _read(
            await self._send(self._calls.call("DELETE", f"{JOBS}/{job_id}")), JobStatus.read
        )

    async def withdraw(self, job_id: str) -> JobStatus:
        """See `Client.leave`."""
        return _read(await self._send(self._calls.withdraw(job_id)), JobStatus.read)

    async def events(self, job_id: str) -> AsyncIterator[JobStatus]:
        """See `Client.events`."""
        call = self._calls.call("GET", f"{JOBS}/{job_id}/events")
        patience = self._calls.patience(call)
        while True:
            try:
                async with self._http.stream(**call) as response:
                    if response.is_error:
                        await response.aread()
                    async for line in self._calls.check(response).aiter_lines():
                        if status := _event(response, line):
                            patience.renew()
                            yield status
                            if status.is_over:
                                return
                raise httpx.RemoteProtocolError("the events ended before the job")
            except httpx.TransportError as error:
                await asyncio.sleep(patience.pause_s(error))

    async def download(self, picture: Picture | str) -> bytes:
        """See `Client.download`."""
        return (await self._send(self._calls.file(picture))).content

    async def _send(self, call: dict[str, Any], *, is_new: bool = False) -> httpx.Response:
        patience = self._calls.patience(call, is_new=is_new)
        while True:
            try:
                return self._calls.check(await self._http.request(**call))
            except httpx.TransportError as error:
                await asyncio.sleep(patience.pause_s(error))


def _read(response: httpx.Response, read: Callable[[Any], T]) -> T:
    """What an answer says. Raises `ServiceUnreachable` if it is not the service's."""
    try:
        return read(response.json())
    except NOT_OURS:
        raise _foreign(response, response.text) from None


def _read_list(answer: dict[str, Any]) -> list[JobStatus]:
    return [JobStatus.read(each) for each in answer["jobs"]]


def _event(response: httpx.Response, line: str) -> JobStatus | None:
    """The job of a line of server-sent events, None for lines that carry none. Raises as `_read` does."""
    if not line or line.startswith((":", "event:", "id:", "retry:")):
        return None
    try:
        return JobStatus.read(json.loads(line.removeprefix("data:")))
    except NOT_OURS:
        raise _foreign(response, line) from None


def _foreign(response: httpx.Response, said: str) -> ServiceUnreachable:
    """The error for an answer that is not the service's."""
    return ServiceUnreachable(
        f"{response.url} answered {response.status_code}: {said.strip()[:200]}", hint=_WHERE
    )


def _problem(answer: dict[str, Any]) -> AlphalayerError:
    """The error that problem details stand for; `detail` begins with the field where there is one."""
    field = answer.get("field")
    message = answer["detail"].removeprefix(f"{field}: ") if field else answer["detail"]
    return AlphalayerError.from_dict(
        {"code": answer["code"], "message": message, "hint": answer.get("hint", ""), "field": field}
    )
