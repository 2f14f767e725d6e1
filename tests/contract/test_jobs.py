"""Jobs over real HTTP: submit, get, list, cancel, follow."""

from __future__ import annotations

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.support.serving import served, wait_until

BODY = {"prompt": "an apple", "steps": 10, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(tmp_path_factory.mktemp("service"), engine_options={"step_s": 0.05}) as client:
        yield client


def submit(client: httpx.Client, headers=None, **fields) -> dict:
    answer = client.post("/alpha/v1/jobs", json={**BODY, **fields}, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == answer.json()["url"]
    return answer.json()


def finished(client: httpx.Client, job: dict, state: str = "done") -> dict:
    wait_until(lambda: client.get(job["url"]).json()["state"] == state, 30)
    return client.get(job["url"]).json()


def test_job_completes_with_its_images(client):
    job = submit(client, batch_size=2, n_iter=2)
    assert job["state"] in ("queued", "running")
    done = finished(client, job)
    assert (done["step"], done["steps"]) == (20, 20)
    assert [image["seed"] for image in done["images"]] == [12345, 12346, 12347, 12348]
    assert client.get(done["images"][1]["url"]).status_code == 200
    assert done["error"] is None
    assert done["created_at"] <= done["started_at"] <= done["finished_at"]


def test_job_has_a_position_and_is_cancelled_alone(client):
    jobs = [submit(client, steps=20, seed=i) for i in range(6)]
    waiting = client.get(jobs[5]["url"]).json()
    assert waiting["position"] >= 2
    assert waiting["eta_s"] > 0
    assert client.delete(jobs[4]["url"]).json()["state"] == "cancelled"
    assert client.delete(jobs[0]["url"]).status_code == 200
    states = [
        finished(client, job, state)
        for job, state in zip(jobs, ["cancelled", *["done"] * 3, "cancelled", "done"], strict=True)
    ]
    assert [len(state["images"]) for state in states] == [0, 1, 1, 1, 0, 1]
    assert client.delete(jobs[1]["url"]).json()["state"] == "done"


def test_running_job_cancelled_stops_within_a_step(client):
    job = submit(client, steps=150)
    wait_until(lambda: client.get(job["url"]).json()["step"] > 0)
    client.delete(job["url"])
    start = time.monotonic()
    finished(client, job, "cancelled")
    assert time.monotonic() - start < 2


def test_job_events_report_every_step_and_the_end(client):
    job = submit(client, previews=True)
    seen: list[tuple[str, dict]] = []
    with client.stream("GET", job["events_url"]) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event:"):
                kind = line[6:].strip()
            elif line.startswith("data:"):
                seen.append((kind, json.loads(line[5:])))
    assert seen[-1][0] == "done"
    assert seen[-1][1]["images"]
    steps = [event["step"] for _, event in seen if event["stage"] == "sample"]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    assert any(event["preview_url"] for _, event in seen)


def test_idempotency_key_repeated_returns_the_same_job(client):
    first = submit(client, headers={"Idempotency-Key": "order-17"})
    second = submit(client, headers={"Idempotency-Key": "order-17"})
    assert first["id"] == second["id"]
    other = client.post(
        "/alpha/v1/jobs", json={"prompt": "other"}, headers={"Idempotency-Key": "order-17"}
    )
    assert (other.status_code, other.json()["field"]) == (422, "Idempotency-Key")
    assert submit(client)["id"] != first["id"]
    finished(client, first)


@pytest.mark.parametrize(
    "route", ["/alpha/v1/txt2img", "/sdapi/v1/txt2img", "/v1/images/generations"]
)
def test_idempotency_key_of_a_waiting_request_generates_once(client, route):
    """Repeat a request as a proxy does whose first answer was lost."""

    def jobs() -> set[str]:
        return {
            job["id"] for job in client.get("/alpha/v1/jobs", params={"limit": 200}).json()["jobs"]
        }

    before, body = jobs(), {"prompt": "x", "seed": -1, "steps": 2}
    body |= {"size": "64x64"} if route.startswith("/v1/") else {"width": 64, "height": 64}
    for _ in range(2):
        client.post(
            route, json=body, headers={"Idempotency-Key": f"order-18{route}"}
        ).raise_for_status()
    assert len(jobs() - before) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_job_is_cancelled_with_its_last_waiting_client(client, stream):
    """Disconnect the first of two clients with one key, the second, then a single one."""
    route = "/v1/images/generations" if stream else "/alpha/v1/txt2img"
    body = (
        {"prompt": "x", "size": "64x64", "quality": "high", "stream": True}
        if stream
        else {**BODY, "steps": 30}
    )

    def generate(name: str, timeout_s: float) -> httpx.Response | None:
        try:
            headers = {"Idempotency-Key": f"{name} {stream}"}
            return client.post(route, json=body, headers=headers, timeout=timeout_s)
        except httpx.ReadTimeout:
            return None

    def jobs() -> dict[str, str]:
        listed = client.get("/alpha/v1/jobs", params={"limit": 200}).json()["jobs"]
        return {job["id"]: job["state"] for job in listed if job["id"] not in before}

    def generate_twice(name: str, first_s: float, second_s: float) -> list[bool]:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(generate, name, first_s)
            wait_until(lambda: "running" in jobs().values())
            answers = [first, pool.submit(generate, name, second_s)]
            return [
                (answer := future.result()) is not None and answer.status_code == 200
                for future in answers
            ]

    before = set()
    before = set(jobs())
    assert generate_twice("first leaves", 0.5, 30) == [False, True]
    assert list(jobs().values()) == ["done"]
    before |= set(jobs())
    assert generate_twice("second leaves", 30, 0.5) == [True, False]
    assert list(jobs().values()) == ["done"]
    before |= set(jobs())
    assert generate("alone", 0.5) is None
    again = generate("alone", 30)
    assert again is not None
    assert again.status_code == 200, again.text
    wait_until(lambda: sorted(jobs().values()) == ["cancelled", "done"])


def test_submitted_job_continues_after_a_client_disconnects(client):
    def disconnect(key: str) -> None:
        headers = {"Idempotency-Key": key}
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                "/alpha/v1/txt2img", json={**BODY, "steps": 30}, headers=headers, timeout=0.5
            )

    before = submit(client, {"Idempotency-Key": "order-19"}, steps=30)
    disconnect("order-19")
    finished(client, before)
    with ThreadPoolExecutor(1) as pool:
        disconnecting = pool.submit(disconnect, "order-20")
        wait_until(lambda: client.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"])
        afterwards = submit(client, {"Idempotency-Key": "order-20"}, steps=30)
        disconnecting.result()
    finished(client, afterwards)


def test_job_is_cancelled_once_all_requests_are_withdrawn(client):
    headers = {"Idempotency-Key": "order-21"}
    job = submit(client, headers, steps=150)
    assert submit(client, headers, steps=150)["id"] == job["id"]
    client.delete(job["url"], params={"leave": True}).raise_for_status()
    wait_until(lambda: client.get(job["url"]).json()["step"] > 0)
    client.delete(job["url"], params={"leave": True}).raise_for_status()
    finished(client, job, "cancelled")
    again = submit(client, headers, steps=150)
    assert again["id"] != job["id"]
    client.delete(again["url"])
    finished(client, again, "cancelled")


def test_job_cancelled_by_its_owner_keeps_its_key(client):
    headers = {"Idempotency-Key": "order-22"}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            client.post, "/alpha/v1/txt2img", json={**BODY, "steps": 150}, headers=headers
        )
        wait_until(lambda: client.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"])
        client.delete(
            client.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"][0]["url"]
        )
        assert waiting.result().status_code == 409
    assert (
        client.post("/alpha/v1/txt2img", json={**BODY, "steps": 150}, headers=headers).status_code
        == 409
    )


def test_idempotency_key_empty_is_refused(client):
    answer = client.post("/alpha/v1/jobs", json=BODY, headers={"Idempotency-Key": ""})
    assert (answer.status_code, answer.json()["field"]) == (422, "Idempotency-Key")


def test_job_with_base64_contains_its_images(client):
    done = finished(client, submit(client, batch_size=2, response_format="base64"))
    for image in done["images"]:
        assert base64.b64decode(image["base64"]) == client.get(image["url"]).content
    listed = client.get("/alpha/v1/jobs").json()["jobs"][0]
    for job in (listed, finished(client, submit(client))):
        assert [image["base64"] for image in job["images"]] == [None] * len(job["images"])


@pytest.mark.parametrize("text", ["a%00b", "%f0%9f%8d%8e", "x" * 500, "A" * 24, "0" * 23])
def test_job_of_another_form_of_id_is_missing(client, monkeypatch, text):
    async def view(_job_id: str) -> None:
        raise AssertionError("such a text must not reach the database")

    monkeypatch.setattr(client.app.state.service.job_queue, "view", view)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        answer = client.request(method, f"/alpha/v1/jobs/{text}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


def test_job_list_is_filtered_and_paged(tmp_path):
    with served(tmp_path) as client:
        jobs = [submit(client, seed=i, steps=1) for i in range(5)]
        for job in jobs:
            finished(client, job)
        page = client.get("/alpha/v1/jobs", params={"limit": 3}).json()
        assert [job["id"] for job in page["jobs"]] == [job["id"] for job in jobs[:1:-1]]
        rest = client.get(
            "/alpha/v1/jobs", params={"limit": 3, "before": page["next_before"]}
        ).json()
        assert [job["id"] for job in rest["jobs"]] == [jobs[1]["id"], jobs[0]["id"]]
        assert client.get("/alpha/v1/jobs", params={"state": "failed"}).json()["jobs"] == []
        for wrong in ({"state": "lost"}, {"limit": 0}, {"page": 2}):
            answer = client.get("/alpha/v1/jobs", params=wrong)
            assert (answer.status_code, answer.json()["field"]) == (422, next(iter(wrong)))


def test_job_is_visible_to_its_owner_only(tmp_path):
    with served(tmp_path, api_auth="ann:a,bob:b", engine=None) as client:
        job = client.post("/alpha/v1/jobs", json=BODY, auth=("ann", "a")).json()
        assert client.get(job["url"], auth=("ann", "a")).status_code == 200
        for method in ("GET", "DELETE"):
            answer = client.request(method, job["url"], auth=("bob", "b"))
            assert answer.status_code == 404
            assert answer.json()["code"] == "job_not_found"
        assert client.get("/alpha/v1/jobs", auth=("bob", "b")).json()["jobs"] == []
        assert client.get(job["url"]).status_code == 401


def test_job_with_unknown_model_or_lora_is_refused_at_once(client):
    for field, value in (("checkpoint", "juggernaut"), ("loras", [{"name": "juggernaut"}])):
        answer = client.post("/alpha/v1/jobs", json={**BODY, field: value})
        assert (answer.status_code, answer.json()["field"]) == (422, field)
        assert "juggernaut" in answer.json()["detail"]


def test_job_events_of_an_unknown_job_are_404(client):
    answer = client.get("/alpha/v1/jobs/000000000000000000000000/events")
    assert answer.status_code == 404
    assert answer.json()["code"] == "job_not_found"
