"""Checks 6, 7, 16, 17, 20 and 21 of the chart: what its pods may do, and what of an operator's wishes reaches them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helm.checkov_tool import checkov_executable
from tests.helm.rendering import PROFILES, Pod, is_core, objects, of_kind, parse, pods, template, text_of

each_profile = pytest.mark.parametrize("profile", PROFILES)
ALLOWED = Path(__file__).parent / "checkov-allowed.yaml"


@pytest.mark.timeout(900)
def test_check_6_checkov_finds_nothing_that_is_not_allowed(tmp_path: Path) -> None:
    """Pods inside of a RayService stand by themselves: checkov does not look into custom objects."""
    allowed = yaml.safe_load(ALLOWED.read_text())
    checkov = checkov_executable()
    for profile in PROFILES:
        items = [item for item in objects(profile) if is_core(item)]
        items += [pod.lifted() for pod in pods(objects(profile)) if pod.component in ("head", "worker")]
        (tmp_path / f"{profile}.yaml").write_text(yaml.safe_dump_all(items))
    command = [checkov, "-d", str(tmp_path), "--framework", "kubernetes", "--compact", "--skip-download", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 100 * len(PROFILES), "checkov looked at nothing"
    found = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    unexpected = [
        f"{check} {resource}"
        for check, resource in sorted(found)
        if check not in allowed or not re.fullmatch(allowed[check]["where"], resource)
    ]
    assert unexpected == []
    assert set(allowed) == {check for check, _ in found}, "something is allowed without need"


@each_profile
def test_check_7_every_container_meets_the_restricted_profile(profile: str) -> None:
    for pod in pods(objects(profile)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        assert all("hostPath" not in volume for volume in pod.spec.get("volumes", []))
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.containers:
            _is_restricted(container["securityContext"])
    for item in of_kind(objects(profile), "RayService"):
        _is_restricted(item["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"])


def _is_restricted(context: dict[str, object]) -> None:
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] != 0
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "privileged" not in context


def test_check_7_what_a_read_only_root_needs_is_writable() -> None:
    for pod in pods(objects("tp-pp")):
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {"/tmp", "/home/switchyard"} <= set(mounts)
            assert not mounts["/tmp"].get("readOnly")
            volumes = {volume["name"] for volume in pod.spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@each_profile
def test_check_16_secrets_are_named_and_never_printed(profile: str) -> None:
    assert of_kind(objects(profile), "Secret") == []
    text = text_of(profile)
    assert re.search(r"hf_[A-Za-z0-9]{10}", text) is None
    assert re.search(r"(?i)password: *[^ {\n]", text) is None
    for pod in pods(objects(profile)):
        tokens = [env for container in pod.containers for env in container.get("env", []) if env["name"] == "HF_TOKEN"]
        assert not tokens or pod.component == "prefetch"


def test_check_16_the_job_that_downloads_has_the_token() -> None:
    (job,) = [pod for pod in pods(objects("disaggregated")) if pod.component == "prefetch"]
    wanted = {"secretKeyRef": {"name": "hub-token", "key": "token"}}
    assert {"name": "HF_TOKEN", "valueFrom": wanted} in job.main["env"]


@each_profile
def test_check_17_only_who_asks_the_api_server_has_a_token(profile: str) -> None:
    items = objects(profile)
    assert of_kind(items, "ClusterRole", "ClusterRoleBinding") == []
    for account in of_kind(items, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for pod in pods(items):
        assert pod.spec["automountServiceAccountToken"] is (pod.component in ("head", "autoscaler")), pod.owner
    for role in of_kind(items, "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "secrets" not in rule["resources"]
            if set(rule["verbs"]) & {"update", "patch", "delete"}:
                assert rule["resourceNames"]
    made = {account["metadata"]["name"] for account in of_kind(items, "ServiceAccount")} | {"inference"}
    assert {pod.spec["serviceAccountName"] for pod in pods(items)} <= made


MARKS = {
    "podDefaults.tolerations[0].key": "mark",
    "podDefaults.nodeSelector.mark": "yes",
    "podDefaults.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight": "7",
    "podDefaults.priorityClassName": "mark",
    "podDefaults.schedulerName": "mark",
    "podDefaults.imagePullSecrets[0].name": "mark",
    "podDefaults.podAnnotations.mark": "yes",
    "podDefaults.podLabels.mark": "yes",
    "podDefaults.extraEnv[0].name": "MARK",
    "podDefaults.extraVolumes[0].name": "mark",
    "podDefaults.extraVolumeMounts[0].name": "mark",
    "podDefaults.extraVolumeMounts[0].mountPath": "/mark",
    "podDefaults.topologySpreadConstraints[0].topologyKey": "mark",
}


@each_profile
def test_check_20_what_is_set_for_all_pods_reaches_all(profile: str) -> None:
    done = template(profile, [f"{key}={value}" for key, value in MARKS.items()])
    assert done.returncode == 0, done.stderr
    made = pods(parse(done.stdout))
    assert len(made) == len(pods(objects(profile))) >= 5
    for pod in made:
        _is_marked(pod)


def _is_marked(pod: Pod) -> None:
    spec = pod.spec
    assert {"key": "mark"} in spec["tolerations"], pod.owner
    assert spec["nodeSelector"]["mark"] == "yes"
    assert "nodeAffinity" in spec["affinity"]
    assert spec["priorityClassName"] == spec["schedulerName"] == "mark"
    assert {"name": "mark"} in spec["imagePullSecrets"]
    assert {"topologyKey": "mark"} in spec["topologySpreadConstraints"]
    assert pod.metadata["annotations"]["mark"] == pod.metadata["labels"]["mark"] == "yes"
    assert {"name": "mark"} in spec["volumes"]
    for container in pod.containers:
        assert {"name": "MARK"} in container["env"]
        assert {"name": "mark", "mountPath": "/mark"} in container["volumeMounts"]


def test_check_20_a_component_adds_to_what_all_have() -> None:
    done = template(
        "disaggregated",
        [
            "podDefaults.nodeSelector.all=yes",
            "podDefaults.tolerations[0].key=all",
            "pools.decode.pod.nodeSelector.decode=yes",
            "pools.decode.pod.tolerations[0].key=decode",
        ],
    )
    by_pool = {pod.metadata["labels"].get("switchyard/pool"): pod for pod in pods(parse(done.stdout))}
    assert by_pool["decode"].spec["nodeSelector"] == {"all": "yes", "decode": "yes"}
    assert [toleration["key"] for toleration in by_pool["decode"].spec["tolerations"]] == ["all", "decode"]
    assert by_pool["prefill"].spec["nodeSelector"] == {"all": "yes"}


@each_profile
def test_check_21_images_do_not_move(profile: str) -> None:
    for pod in pods(objects(profile)):
        for container in pod.containers:
            name, at, digest = container["image"].partition("@")
            tag = name.rpartition(":")[2]
            assert digest.startswith("sha256:") if at else tag and tag != "latest", container["image"]


def test_check_21_a_digest_counts_more_than_a_tag() -> None:
    digest = "sha256:" + "a" * 64
    done = template("cpu", [f"images.{name}.digest={digest}" for name in ("router", "ray", "autoscaler")])
    images = {container["image"] for pod in pods(parse(done.stdout)) for container in pod.containers}
    assert images == {f"switchyard/{name}@{digest}" for name in ("router", "ray", "autoscaler")}
