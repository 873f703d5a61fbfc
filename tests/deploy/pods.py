"""Runs a rendered pod's container as processes of this machine: its command, environment, user and volumes as written.

Each pod has a host of its own (see hosts). What a kubelet and KubeRay do is done here: volumes are mounted, fields
resolved, Services put into /etc/hosts, `ray start` made of rayStartParams. There is no image: the container's files are
this machine's, read-only.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from deploy.config import ROOT
from tests.hosts import Host
from tests.processes import python_environment

Spec = dict[str, Any]

SERVICE_ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"  # /var/run is a link to /run

# As KubeRay 1.7 sets them (ray-operator/controllers/ray/common/pod.go).
_OPERATORS = {"RAY_TIMEOUT_MS_TASK_WAIT_FOR_DEATH_INFO": "0", "RAY_gcs_server_request_timeout_seconds": "5"}

# As the kubelet's gRPC probe.
_ASK_HEALTH = """
import sys, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}"))
status = stub.Check(health_pb2.HealthCheckRequest(), timeout=3).status
sys.exit(status != health_pb2.HealthCheckResponse.SERVING)
"""


class Pod:
    """One pod's container on a host."""

    def __init__(
        self,
        host: Host,
        name: str,
        address: str,
        spec: Spec,
        volumes: Mapping[str, Mapping[str, str]],
        services: Mapping[str, str],
        folder: Path,
        service_account: Mapping[str, str] | None = None,
    ) -> None:
        """volumes: files by the name of the ConfigMap or Secret. services: addresses by name. folder: for us.
        service_account: files, for a pod that has its token mounted."""
        self.host = host
        (self.container,) = spec["containers"]
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        fields = {"metadata.name": name, "metadata.namespace": "prod", "status.podIP": address}
        self._environment = {**_image_environment(), **{e["name"]: _value(e, fields) for e in self.container["env"]}}
        self._mount(spec, volumes, services, service_account or {})
        self._security = {**spec["securityContext"], **self.container["securityContext"]}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], **environment: str) -> None:
        """Run the container's process, as the user and with the rights of its security context."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.host.command([*self._restricted(), *command]),
                stdout=output,
                stderr=output,
                env={**self._environment, **environment},
            )

    def run(self, command: list[str]) -> subprocess.CompletedProcess[bytes]:
        """`kubectl exec`, and the probes."""
        wrapped = self.host.command([*self._restricted(), *command])
        return subprocess.run(wrapped, capture_output=True, env=self._environment, timeout=60, check=False)

    def is_ready(self) -> bool:
        """What the readiness probe says."""
        probe = self.container["readinessProbe"]
        if "exec" in probe:
            return self.run(probe["exec"]["command"]).returncode == 0
        if "httpGet" in probe:
            port = {p["name"]: p["containerPort"] for p in self.container["ports"]}[probe["httpGet"]["port"]]
            return self.run(["curl", "-sf", f"http://127.0.0.1:{port}{probe['httpGet']['path']}"]).returncode == 0
        return self.run([sys.executable, "-c", _ASK_HEALTH, str(probe["grpc"]["port"])]).returncode == 0

    def kill(self) -> None:
        """SIGKILL to all of its processes, as when its node is lost."""
        assert self.process is not None
        processes = psutil.Process(self.process.pid).children(recursive=True)
        for process in processes:
            process.kill()
        self.process.wait(30)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self._folder / "log"

    def _restricted(self) -> list[str]:
        assert self._security["allowPrivilegeEscalation"] is False
        assert self._security["capabilities"] == {"drop": ["ALL"]}
        user, group = self._security["runAsUser"], self._security["runAsGroup"]
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]

    def _mount(
        self,
        spec: Spec,
        volumes: Mapping[str, Mapping[str, str]],
        services: Mapping[str, str],
        service_account: Mapping[str, str],
    ) -> None:
        group = spec["securityContext"]["fsGroup"]
        # Mount points are made in a layer over this machine's folders, and Python may lie in a home that others cannot
        # enter; the layer's folder can be entered.
        lines = ["set -e"]
        for number, lower in enumerate(["/etc", "/home", "/root", "/run"]):
            upper = self._folder / f"layer{number}"
            lines.append(f"mkdir -p {upper}/upper {upper}/work && chmod 755 {upper}/upper")
            lines.append(
                f"mount -t overlay -o lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work none {lower}"
            )
        lines.append("cp /etc/hosts /etc/hosts.made && mv /etc/hosts.made /etc/hosts")
        lines.append("echo nameserver 127.0.0.1 > /etc/resolv.made && mv /etc/resolv.made /etc/resolv.conf")  # refuses
        lines += [f"echo {address} {name} >> /etc/hosts" for name, address in services.items()]
        by_name = {volume["name"]: volume for volume in spec["volumes"]}
        mounted: dict[str, Mapping[str, str]] = {}
        for mount in self.container["volumeMounts"]:
            volume = by_name[mount["name"]]
            source = volume.get("configMap", {}).get("name") or volume.get("secret", {}).get("secretName")
            assert source is not None or "emptyDir" in volume, volume
            mounted[mount["mountPath"]] = volumes[source] if source is not None else {}
        if service_account:
            assert spec["automountServiceAccountToken"] is True
            mounted[SERVICE_ACCOUNT] = service_account
        root = shlex.quote(str(ROOT))
        lines.append(f"exec 9<{root}")
        for path, files in mounted.items():
            lines.append(f"mkdir -p {path} && mount -t tmpfs -o mode=1777 none {path}")
            if ROOT.is_relative_to(path):  # as where this tree was cloned into /tmp
                lines.append(f"mkdir -p {root} && mount -c --bind /proc/self/fd/9 {root}")
            for key, content in files.items():
                target = shlex.quote(f"{path}/{key}")
                lines.append(
                    f"printf %s {shlex.quote(content)} > {target} && chgrp {group} {target} && chmod 0440 {target}"
                )
        lines.append("mount -o remount,bind,ro /")
        self.host.run("sh", "-c", "\n".join(lines))


def ray_start(kind: str, parameters: Mapping[str, str], head: str) -> list[str]:
    """The container command that KubeRay makes: a shell runs it, so quotes in the parameters count."""
    given = {"dashboard-agent-listen-port": "52365", "metrics-export-port": "8080", **parameters}
    options = " ".join(f"--{name}={value}" for name, value in sorted(given.items()))
    where = "--head" if kind == "head" else f"--address={head}:6379"
    return ["/bin/bash", "-c", f"ulimit -n 65536; ray start {where} --block {options}"]


def operator_environment(cluster: str, **more: str) -> dict[str, str]:
    """What KubeRay sets for Ray's processes."""
    return {**_OPERATORS, "RAY_CLUSTER_NAME": cluster, **more}


def _image_environment() -> dict[str, str]:
    """As the image's ENV: where programs and packages are."""
    ours = python_environment()
    path = os.pathsep.join([os.path.dirname(sys.executable), "/usr/bin", "/bin", "/usr/sbin"])
    return {"PATH": path, "PYTHONPATH": ours["PYTHONPATH"], "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def _value(entry: Spec, fields: Mapping[str, str]) -> str:
    return str(entry["value"]) if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
