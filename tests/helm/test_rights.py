"""The autoscaler's Role against its code: every right is used, and no other is asked for."""

from __future__ import annotations

from deploy.kubernetes.client import RAY_SERVICES
from deploy.kubernetes.events import EventLog, ObjectReference
from deploy.kubernetes.facts import ClusterFacts, release_of_pod
from deploy.kubernetes.lease import LeaseHolder
from tests.deploy.kubernetes.contract import ray_service
from tests.deploy.kubernetes.fake_api import FakeKubernetes, api_of
from tests.helm.rendering import objects, of_kind, pods
from tests.helm.rendering import ray_service as ray_service_of


def test_check_17_the_autoscalers_role_has_what_its_code_uses() -> None:
    items = objects("cpu")
    (role,) = of_kind(items, "Role")
    (pod,) = [pod for pod in pods(items) if pod.component == "autoscaler"]
    lease = pod.main["command"][pod.main["command"].index("--lease") + 1]
    service = ray_service_of(items)["metadata"]["name"]
    fake = FakeKubernetes()
    try:
        fake.tokens["token"] = "autoscaler"
        fake.roles["autoscaler"] = role["rules"]
        fake.add(ray_service(service))
        labels = pod.metadata["labels"]
        fake.add({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "autoscaler-0", "labels": labels}})
        api = api_of(fake, "token")
        assert release_of_pod(api, "prod", "autoscaler-0") == "r"
        holder = LeaseHolder(api, "prod", lease, "autoscaler-0")
        assert holder.hold()
        assert holder.hold()
        holder.release()
        events = EventLog(api, "prod", ObjectReference(RAY_SERVICES, service), "switchyard-autoscaler", "autoscaler-0")
        assert events.emit("Reason", "note", "Action")
        facts = ClusterFacts(api, "prod", "r").read()
        assert facts is not None
        assert [found.component for found in facts.pods] == ["autoscaler"]
        refused = {(seen.verb, seen.resource) for seen in fake.seen if seen.status == 403}
        used = {(seen.verb, seen.resource) for seen in fake.seen} - refused
    finally:
        fake.stop()
    assert refused == {("list", "nodes")}
    assert used == {
        (verb, f"{resource}.{group}" if group else resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for group in rule["apiGroups"]
    }
