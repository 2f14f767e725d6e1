"""Keys over real HTTP: headers, rate limits, shares of the queue, and storage without secrets."""

from __future__ import annotations

import asyncio
import base64
import socket
import stat
from pathlib import Path

import pytest
from tests.support.serving import served, wait_until

from alphalayer.api import auth
from alphalayer.auth import api_keys, store
from alphalayer.auth.wrong_keys import PER_MINUTE
from alphalayer.config import Settings
from alphalayer.core.errors import SetupFailed
from alphalayer.service.app import check

BODY = {"prompt": "x", "steps": 1, "width": 64, "height": 64}


def test_key_is_accepted_in_every_header(tmp_path):
    file = tmp_path / "keys.json"
    secret = api_keys.add_key(file, "shop")
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with served(tmp_path, keys_file=file, api_auth="ann:secret") as client:
        for headers in ({"Authorization": f"Bearer {secret}"}, {"X-API-Key": secret}):
            assert client.post("/alpha/v1/txt2img", json=BODY, headers=headers).status_code == 200
        assert client.post("/alpha/v1/txt2img", json=BODY, auth=("any", secret)).status_code == 200
        assert (
            client.post("/alpha/v1/txt2img", json=BODY, auth=("ann", "secret")).status_code == 200
        )
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"X-API-Key": "é"},
            {"Authorization": "Basic !"},
        ):
            encoded = {name: value.encode() for name, value in headers.items()}
            refused = client.post("/alpha/v1/txt2img", json=BODY, headers=encoded)
            assert refused.status_code == 401
            assert refused.json()["code"] == "unauthorized"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_password_outside_ascii_is_accepted_in_both_encodings(tmp_path, encoding):
    pair = "ann:pässwörd".encode(encoding)
    with served(tmp_path, api_auth="ann:pässwörd", engine=None) as client:
        for header in (b"Basic " + base64.b64encode(pair), b"Bearer " + pair):
            assert (
                client.get("/alpha/v1/jobs", headers={"Authorization": header}).status_code == 200
            )


def test_keys_file_changes_apply_to_a_running_service(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHECK_EVERY_S", 0)
    file = tmp_path / "keys.json"
    api_keys.add_key(file, "first")
    with served(tmp_path, keys_file=file, engine=None) as client:

        def is_known(secret):
            return client.get("/alpha/v1/jobs", headers={"X-API-Key": secret}).status_code == 200

        secret = api_keys.add_key(file, "second", queue_share=0.5)
        assert is_known(secret)
        good = file.read_text()
        file.write_text("{")  # the keys stay what they were
        assert is_known(secret)
        file.unlink()
        assert is_known(secret)
        assert client.get("/alpha/v1/jobs").status_code == 401
        file.write_text(good)
        api_keys.remove_key(file, "second")
        assert not is_known(secret)


def test_keys_file_first_key_closes_a_running_service(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without the setting, its file may be missing
    with served(tmp_path, engine=None) as client:
        assert client.get("/alpha/v1/jobs").status_code == 200
        api_keys.add_key(Path("data/keys.json"), "first")
        wait_until(lambda: client.get("/alpha/v1/jobs").status_code == 401)


def test_unknown_key_and_missing_key_have_own_messages(tmp_path):
    api_keys.add_key(tmp_path / "keys.json", "shop")
    with served(tmp_path, keys_file=tmp_path / "keys.json", engine=None) as client:
        for headers, message in (
            ({}, "a key is needed."),
            ({"X-API-Key": "alk_x"}, "this key is not known."),
        ):
            assert (
                client.get("/alpha/v1/jobs", headers=headers).json()["detail"].startswith(message)
            )


def test_key_above_its_rate_limit_gets_429(tmp_path):
    secret = api_keys.add_key(tmp_path / "keys.json", "shop", per_minute=2)
    with served(tmp_path, keys_file=tmp_path / "keys.json") as client:
        client.headers["X-API-Key"] = secret
        generated = client.post("/alpha/v1/txt2img", json=BODY)
        convert = f"/alpha/v1/convert/{generated.json()['filename']}?format=webp"
        answers = [generated, client.get(convert), client.get(convert)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[2].json()["code"] == "rate_limited"
        assert 1 <= int(answers[2].headers["retry-after"]) <= 60
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 429
        assert client.get("/alpha/v1/jobs").status_code == 200


def test_key_fills_only_its_share_of_the_queue(tmp_path):
    small, large = (
        api_keys.add_key(tmp_path / "keys.json", name, queue_share=share)
        for name, share in (("s", 0.2), ("l", 1.0))
    )
    with served(
        tmp_path, keys_file=tmp_path / "keys.json", queue_limit=10, engine_options={"step_s": 0.2}
    ) as client:
        slow = {**BODY, "steps": 30}

        def submit(secret):
            return client.post(
                "/alpha/v1/jobs", json=slow, headers={"X-API-Key": secret}
            ).status_code

        statuses = [submit(small) for _ in range(8)]
        assert statuses.count(202) in (3, 4)  # two wait, one or two are in the engine process
        assert statuses[-1] == 429
        assert submit(large) == 202


def test_keys_file_without_keys_rejects_every_request(tmp_path):
    file = tmp_path / "keys.json"
    api_keys.add_key(file, "shop")
    api_keys.remove_key(file, "shop")
    with served(tmp_path, keys_file=file, engine=None) as client:
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 401
        assert client.get("/sdapi/v1/options", auth=("shop", "")).status_code == 401


def test_check_ambiguous_keys_prevent_the_start(tmp_path):
    def start(**settings):
        folders = {"data_dir": tmp_path / "data", "outputs_dir": tmp_path / "outputs"}
        asyncio.run(check(Settings(**folders, **settings)))

    file = tmp_path / "keys.json"
    with pytest.raises(SetupFailed, match=r"keys_file: .* is missing"):
        start(keys_file=file)
    api_keys.add_key(file, "ann")
    start(keys_file=file, api_auth="bob:secret")
    with pytest.raises(SetupFailed, match=r'"ann" is a key .* and a user in api_auth'):
        start(keys_file=file, api_auth="bob:secret,ann:secret")
    file.unlink()
    file.mkdir()  # as Docker creates it for a missing file
    with pytest.raises(SetupFailed, match="cannot be read"):
        start(keys_file=file)


def test_keys_are_added_listed_and_removed(tmp_path):
    file = tmp_path / "keys.json"
    assert api_keys.read_keys(file) is None
    api_keys.add_key(file, "a")
    with pytest.raises(SetupFailed, match="already"):
        api_keys.add_key(file, "a")
    with pytest.raises(SetupFailed, match="queue_share"):
        api_keys.add_key(file, "b", queue_share=2)
    api_keys.remove_key(file, "a")
    assert api_keys.read_keys(file) == []
    with pytest.raises(SetupFailed, match="no key"):
        api_keys.remove_key(file, "a")
    file.write_text("{")
    with pytest.raises(SetupFailed, match="cannot be read"):
        api_keys.read_keys(file)


def test_key_is_checked_before_the_body_is_read(tmp_path):
    """A client without a key gets 401, whatever its body is, and however long it takes."""
    file = tmp_path / "keys.json"
    api_keys.add_key(file, "shop")
    paths = ("/alpha/v1/txt2img", "/alpha/v1/jobs", "/sdapi/v1/txt2img", "/v1/images/generations")
    with (
        served(tmp_path, keys_file=file, engine=None) as client,
        socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection,
    ):
        for path in paths:
            refused = client.post(path, content=b"{", headers={"Content-Type": "application/json"})
            assert refused.status_code == 401, path
        # the body of this request never comes
        connection.sendall(
            b"POST /alpha/v1/txt2img HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 401"


def test_key_without_the_scope_gets_403_in_every_dialect(tmp_path):
    file = tmp_path / "keys.json"
    secret = api_keys.add_key(file, "shop", scopes=("read",))
    with served(tmp_path, keys_file=file, engine=None) as client:
        client.headers["X-API-Key"] = secret
        # not even the body is read
        refused = client.post("/alpha/v1/jobs", content=b"{")
        assert refused.status_code == 403
        assert refused.json()["code"] == "forbidden"
        assert '"generate"' in refused.json()["detail"]
        assert "generate" in client.post("/sdapi/v1/txt2img", json=BODY).json()["detail"]
        error = client.post("/v1/images/generations", json=BODY).json()["error"]
        assert error["code"] == "forbidden"
        assert client.get("/metrics").status_code == 403
        assert client.post("/sdapi/v1/refresh-loras").status_code == 403
        for path in ("/alpha/v1/models", "/sdapi/v1/samplers", "/v1/models", "/alpha/v1/jobs"):
            assert client.get(path).status_code == 200, path


def test_options_of_one_key_do_not_change_those_of_another(tmp_path):
    file = tmp_path / "keys.json"
    ann, bob = ({"X-API-Key": api_keys.add_key(file, name)} for name in ("ann", "bob"))
    path, name = "/sdapi/v1/options", "CLIP_stop_at_last_layers"
    with served(tmp_path, keys_file=file, engine=None) as client:
        assert client.post(path, json={name: 2}, headers=ann).status_code == 200
        assert client.get(path, headers=ann).json()[name] == 2
        assert client.get(path, headers=bob).json()[name] == 1
    with served(tmp_path, keys_file=file, engine=None) as client:
        assert client.get(path, headers=ann).json()[name] == 2


def test_event_stream_of_a_removed_key_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHECK_EVERY_S", 0)
    monkeypatch.setattr(auth, "RECHECK_S", 0.05)
    file = tmp_path / "keys.json"
    headers = {"X-API-Key": api_keys.add_key(file, "shop")}
    other = {"X-API-Key": api_keys.add_key(file, "other")}
    slow = {"engine_options": {"step_s": 0.5}, "drain_s": 0}
    with served(tmp_path, keys_file=file, **slow) as client:
        job = client.post("/alpha/v1/jobs", json={**BODY, "steps": 100}, headers=headers).json()
        for path in ("", "/events"):
            assert client.get(f"/alpha/v1/jobs/{job['id']}{path}", headers=other).status_code == 404
        # a client that does not own the job cannot stop it by the other dialect
        assert client.post("/sdapi/v1/interrupt", headers=other).status_code == 200
        with client.stream("GET", f"/alpha/v1/jobs/{job['id']}/events", headers=headers) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("event: ")
            new = {"X-API-Key": api_keys.rotate_key(file, "shop")}
            states = {line for line in lines if line.startswith("event: ")}
        assert states <= {"event: queued", "event: running"}
        refused = client.get(f"/alpha/v1/jobs/{job['id']}/events", headers=headers)
        assert refused.status_code == 401
        assert client.delete(f"/alpha/v1/jobs/{job['id']}", headers=new).status_code == 200


def test_wrong_keys_of_an_address_get_429(tmp_path):
    file = tmp_path / "keys.json"
    secret = api_keys.add_key(file, "shop")
    with served(tmp_path, keys_file=file, engine=None) as client:

        def status(key, address="10.0.0.1"):
            # the test's own address is a trusted proxy
            headers = {"X-API-Key": key, "X-Forwarded-For": address}
            return client.get("/alpha/v1/jobs", headers=headers)

        statuses = [status(f"guess {i}").status_code for i in range(PER_MINUTE + 1)]
        assert statuses == [401] * PER_MINUTE + [429]
        assert 1 <= int(status("guess").headers["retry-after"]) <= 60
        assert status("guess", "10.0.0.2").status_code == 401
        assert status(secret).status_code == 200


def test_job_above_the_cost_of_its_key_is_refused(tmp_path):
    file = tmp_path / "keys.json"
    secret = api_keys.add_key(file, "shop", cost_per_minute=10)
    with served(tmp_path, keys_file=file, engine=None) as client:
        client.headers["X-API-Key"] = secret
        large = {**BODY, "width": 2048, "height": 2048, "steps": 30}
        refused = client.post("/alpha/v1/jobs", json=large)
        assert refused.status_code == 422
        assert 'the key "shop" allows 10 a minute' in refused.json()["detail"]
        assert client.post("/alpha/v1/jobs", json=BODY).status_code == 202
