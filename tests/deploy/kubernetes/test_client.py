"""Check 29: credentials, time-outs, pages and errors against a fake Kubernetes API."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes import client as official
from kubernetes.config import incluster_config

from deploy.errors import ConfigError
from deploy.kubernetes.client import (
    LEASES,
    PODS,
    ApiRefused,
    ApiUnreachable,
    KubernetesApi,
    from_kubeconfig,
    in_cluster,
    own_namespace,
)
from deploy.kubernetes.lease import LeaseHolder
from tests.deploy.kubernetes.fake_api import ADMIN, FakeKubernetes, api_of, self_signed

NAME = "chat-autoscaler"


@pytest.fixture
def fake() -> Iterator[FakeKubernetes]:
    server = FakeKubernetes()
    yield server
    server.stop()


def test_lists_are_read_page_after_page(fake: FakeKubernetes) -> None:
    for number in range(501):
        fake.add({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{number:03}", "labels": {"a": "b"}}})
    fake.add({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other"}})
    names = [item["metadata"]["name"] for item in api_of(fake).list(PODS, "prod", labelSelector="a=b")]
    assert names == [f"p{number:03}" for number in range(501)]
    assert [seen.verb for seen in fake.seen] == ["list"] * 3


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        ("limited", 403, "not allowed to get leases.coordination.k8s.io chat-autoscaler in namespace prod: "),
        ("nobodys", 401, "could not get leases.coordination.k8s.io chat-autoscaler in namespace prod: the credentials"),
        (ADMIN, 404, "could not get leases.coordination.k8s.io chat-autoscaler in namespace prod: 404 NotFound: "),
    ],
)
def test_refusals_are_one_line_that_names_verb_and_resource(
    fake: FakeKubernetes, token: str, status: int, said: str
) -> None:
    fake.tokens["limited"] = "limited"
    with pytest.raises(ApiRefused) as refused:
        api_of(fake, token).get(LEASES, "prod", NAME)
    assert refused.value.status == status
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_an_api_that_does_not_answer_costs_no_more_than_the_time_out() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        configuration = official.Configuration(host=f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = datetime.now(UTC)
        with pytest.raises(ApiUnreachable, match=r"could not get pods x in namespace prod: .*timed out"):
            KubernetesApi(configuration, timeout_s=0.2).get(PODS, "prod", "x")
        assert datetime.now(UTC) - started < timedelta(seconds=2)


def test_a_web_page_is_not_taken_for_the_api(fake: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "answer", lambda *_: (200, {"hello": "world"}))
    with pytest.raises(ApiUnreachable, match="not an object of Kubernetes"):
        api_of(fake).get(PODS, "prod", "x")


def test_a_kubeconfig_is_read(fake: FakeKubernetes, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "a",
                "contexts": [{"name": "a", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": fake.url}}],
                "users": [{"name": "u", "user": {"token": ADMIN}}],
            }
        )
    )
    assert list(from_kubeconfig(str(path)).list(PODS, "prod")) == []
    with pytest.raises(ConfigError, match=r"kubeconfig .*other"):
        from_kubeconfig(str(path), context="other")
    with pytest.raises(ConfigError, match=r"^kubeconfig .*none: "):
        from_kubeconfig(str(tmp_path / "none"))


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeKubernetes, Path]]:
    """What a pod has: the address in its environment, and a folder with token, authority and namespace."""
    server = FakeKubernetes(tls=self_signed(tmp_path))
    (tmp_path / "token").write_text("first")
    (tmp_path / "namespace").write_text("prod\n")
    server.tokens["first"] = "autoscaler"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.url.rpartition(":")[2])
    yield server, tmp_path
    server.stop()


def test_a_rotated_token_is_read_anew(pod: tuple[FakeKubernetes, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, credentials = pod
    server.roles["autoscaler"] = [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create"]}
    ]
    later = datetime.now() + timedelta(seconds=61)
    api = in_cluster(credentials)
    assert own_namespace(credentials) == "prod"
    assert LeaseHolder(api, "prod", NAME, "a").hold()
    (credentials / "token").write_text("second")
    server.tokens = {"second": "autoscaler"}
    assert not LeaseHolder(api, "prod", NAME, "a").hold()
    frozen = SimpleNamespace(datetime=SimpleNamespace(now=lambda: later), timedelta=timedelta)
    monkeypatch.setattr(incluster_config, "datetime", frozen)
    assert api.get(LEASES, "prod", NAME)["spec"]["holderIdentity"] == "a"
    (credentials / "token").unlink()
    later += timedelta(seconds=61)
    contender = LeaseHolder(api, "prod", NAME, "a")
    assert not contender.hold()
    assert "No such file" in contender.problem


def test_outside_of_a_pod_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"^not in a pod that may ask the Kubernetes API: Service host"):
        in_cluster(tmp_path)
    with pytest.raises(ConfigError, match=r"^not in a pod that may ask the Kubernetes API: "):
        own_namespace(tmp_path)


def test_another_authority_is_not_trusted(pod: tuple[FakeKubernetes, Path], tmp_path: Path) -> None:
    _, credentials = pod
    other = tmp_path / "other"
    other.mkdir()
    self_signed(other)
    (credentials / "ca.crt").write_text((other / "ca.crt").read_text())
    contender = LeaseHolder(in_cluster(credentials), "prod", NAME, "a")
    assert not contender.hold()
    assert "CERTIFICATE_VERIFY_FAILED" in contender.problem.upper()
