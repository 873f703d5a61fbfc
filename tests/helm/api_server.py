"""Runs a real kube-apiserver on loopback: an empty cluster without controllers, so no pod ever starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.helm import down_convert
from tests.helm.api_server_build import Binaries
from tests.helm.rendering import CHART, helm_executable
from tests.helm.schemas import CRDS
from tests.processes import free_port

Json = dict[str, Any]
ADMIN, LIMITED = "admin-token", "limited-token"
_READY_S = 120


@dataclass(frozen=True)
class Answer:
    """Of the server."""

    status: int
    body: Json

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


class ApiServer:
    """etcd and kube-apiserver with role-based access; two static tokens, and ServiceAccounts' own."""

    def __init__(self, programs: Binaries, folder: Path) -> None:
        self.folder = folder
        self.url = f"https://127.0.0.1:{free_port()}"
        self._etcd_url = f"http://127.0.0.1:{free_port()}"
        self._kinds: dict[tuple[str, str], Json] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self.certificate = folder / "apiserver.crt"
        self.pool = urllib3.PoolManager()
        self._write_credentials()
        try:
            self._start_all(programs)
        except BaseException:
            self.stop()
            raise

    def ask(self, method: str, path: str, body: Any = None, token: str = ADMIN) -> Answer:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        got = self.pool.request(method, self.url + path, body=data, headers=headers, timeout=30, retries=False)
        try:
            return Answer(got.status, got.json())
        except ValueError:
            return Answer(got.status, {"message": got.data.decode(errors="replace")})

    def create(self, item: Json, dry_run: bool = False) -> Answer:
        """Makes an object in its namespace, or has the server only check it."""
        path = self.path_of(item) + ("?dryRun=All" if dry_run else "")
        return self.ask("POST", path, item)

    def path_of(self, item: Json) -> str:
        """Where objects of its kind are."""
        version, kind = item["apiVersion"], item["kind"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if (version, kind) not in self._kinds:
            for resource in self.ask("GET", root).body.get("resources", []):
                if "/" not in resource["name"]:
                    self._kinds[version, resource["kind"]] = resource
        resource = self._kinds[version, kind]
        where = f"/namespaces/{item['metadata'].get('namespace', 'default')}" if resource["namespaced"] else ""
        return f"{root}{where}/{resource['name']}"

    def token_of(self, namespace: str, account: str) -> str:
        """A ServiceAccount's token, as a kubelet asks for it."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        got = self.ask("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", body)
        assert got.status == 201, got.message
        return str(got.body["status"]["token"])

    def compact(self, version: int) -> None:
        """Forgets what was before a version."""
        body = json.dumps({"revision": version})
        got = self.pool.request("POST", f"{self._etcd_url}/v3/kv/compaction", body=body, timeout=30, retries=False)
        assert got.status == 200, got.data

    def helm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs helm against this server, with what is rendered converted to the server's age."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HELM_", "KUBE"))}
        homes = {f"HELM_{name}_HOME": str(self.folder / "helm" / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        return subprocess.run(
            [helm_executable(), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**kept, **homes, "KUBECONFIG": str(self.folder / "kubeconfig")},
        )

    def chart(self) -> Path:
        """A copy of the chart that does not refuse the server's age."""
        made = self.folder / "chart"
        if not made.exists():
            shutil.copytree(CHART, made)
            about = yaml.safe_load((made / "Chart.yaml").read_text())
            (made / "Chart.yaml").write_text(yaml.safe_dump({**about, "kubeVersion": ">=1.20.0-0"}))
        return made

    def post_renderer(self) -> Path:
        made = self.folder / "post-renderer"
        made.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{down_convert.__file__}"\n')
        made.chmod(0o755)
        return made

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start_all(self, programs: Binaries) -> None:
        etcd = self._etcd_url
        self._start(
            str(programs.etcd),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{free_port()}",
            "--unsafe-no-fsync",
        )
        self._start(
            str(programs.kube_apiserver),
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.url.rpartition(':')[2]}",
            f"--cert-dir={self.folder}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://tests.example",
            f"--service-account-key-file={self.folder / 'accounts.pub'}",
            f"--service-account-signing-key-file={self.folder / 'accounts.key'}",
            "--disable-admission-plugins=ServiceAccount",
            "--service-cluster-ip-range=10.0.0.0/24",
        )
        _wait(self.certificate.exists, "its certificate", self._look_at_processes)
        self.pool = urllib3.PoolManager(ca_certs=str(self.certificate))
        _wait(self._is_ready, "readiness", self._look_at_processes)
        for path in sorted(CRDS.glob("*.yaml")):
            self._add_definition(yaml.load(path.read_text(), yaml.CSafeLoader))

    def _write_credentials(self) -> None:
        tokens = f'{ADMIN},admin,1,"system:masters"\n{LIMITED},limited,2\n'
        (self.folder / "tokens.csv").write_text(tokens)
        key = rsa.generate_private_key(65537, 2048)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        (self.folder / "accounts.key").write_bytes(secret)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (self.folder / "accounts.pub").write_bytes(public)
        settings = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
            "clusters": [
                {
                    "name": "tests",
                    "cluster": {"server": self.url, "certificate-authority": str(self.folder / "apiserver.crt")},
                }
            ],
            "users": [{"name": "admin", "user": {"token": ADMIN}}],
        }
        (self.folder / "kubeconfig").write_text(yaml.safe_dump(settings))
        (self.folder / "kubeconfig").chmod(0o600)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{Path(command[0]).name}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder))

    def _look_at_processes(self) -> None:
        for process in self._processes:
            if process.poll() is not None:
                log = self.folder / f"{Path(str(process.args[0])).name}.log"  # type: ignore[index]
                raise RuntimeError(f"{log.stem} ended with {process.returncode}: {log.read_text()[-2000:]}")

    def _is_ready(self) -> bool:
        try:
            return self.pool.request("GET", f"{self.url}/readyz", timeout=5, retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _add_definition(self, item: Json) -> None:
        made = self.create(item)
        assert made.status == 201, made.message
        path = f"{self.path_of(item)}/{item['metadata']['name']}"

        def is_served() -> bool:
            conditions = self.ask("GET", path).body["status"]["conditions"] or ()
            return any(found["type"] == "Established" and found["status"] == "True" for found in conditions)

        _wait(is_served, item["metadata"]["name"], self._look_at_processes)


def _wait(condition: Callable[[], bool], what: str, check: Callable[[], None]) -> None:
    until = time.monotonic() + _READY_S
    while not condition():
        check()
        if time.monotonic() > until:
            raise TimeoutError(f"kube-apiserver: waited {_READY_S} s for {what}")
        time.sleep(0.1)
