"""Values that cannot work are refused, by schema or template, with the path of the key. Checks 15 and 21 among them."""

from __future__ import annotations

import pytest

from tests.helm.rendering import objects, refusal


@pytest.mark.parametrize(
    ("profile", "settings", "message"),
    [
        ("tp", ["cluster.pools.mixed.tp=3"], "cluster.pools.mixed.tp: 3 ranks need 3 GPUs of one node, which do not"),
        ("tp", ["cluster.pools.mixed.tp=16"], "cluster.pools.mixed.tp: 16 ranks need 16 GPUs of one node"),
        ("tp", ["cluster.pools.mixed.gpus_per_rank=0.5"], "cluster.pools.mixed.gpus_per_rank: 0.5 is no whole number"),
        (
            "tp",
            ["pools.mixed.resources.limits.nvidia\\.com/gpu=4"],
            "pools.mixed.resources.limits: nvidia.com/gpu follows from cluster.pools.mixed.tp",
        ),
        ("cpu", ["cluster.router.drain_s=700"], "router.terminationGracePeriodSeconds: 660 must be more than 715"),
        ("cpu", ["router.terminationGracePeriodSeconds=620"], "router.terminationGracePeriodSeconds: 620 must be more"),
        ("cpu", ["cluster.router.drain_s=5"], "cluster.router.drain_s: 5 is shorter than the longest stream"),
        (
            "cpu",
            ["cluster.pools.decode.drain_timeout_s=700"],
            "pools.decode.terminationGracePeriodSeconds: 660 must be more than 705",
        ),
        ("cpu", ["cluster.pools.decode.drain_timeout_s=7"], "cluster.pools.decode.drain_timeout_s: 7 is shorter than"),
        ("cpu", ["images.ray.digest=sha256:12"], "images.ray.digest: Does not match pattern"),
        (
            "cpu",
            ["cluster.pools.Mixed_1.role=mixed"],
            "cluster.pools.Mixed_1: the name of a pool becomes part of names",
        ),
        ("cpu", [f"cluster.pools.{'a' * 21}.role=mixed"], f"cluster.pools.{'a' * 21}: the name of a pool"),
        ("cpu", ["cluster.pools.router.role=mixed"], "cluster.pools.router: another object of the chart has this name"),
        ("cpu", ["pools.mixed.shmSize=1Gi"], "pools.mixed: there is no cluster.pools.mixed (there is decode, prefill)"),
        ("tp", ["cluster.pools.mixed.device=auto"], "cluster.pools.mixed.device: must be cpu or cuda"),
        ("tp", ["cluster.pools.mixed.min_replicas=3"], "cluster.pools.mixed.replicas: 2 is not between min_replicas=3"),
        ("tp", ["cluster.pools.mixed.max_replicas=1"], "cluster.pools.mixed.replicas: 2 is not between"),
        ("tp", ["pools.mixed.resources.limits.memory=64Gi"], "pools.mixed.resources.limits.memory: 64Gi must be more"),
        ("tp", ["pools.mixed.shmSize=64Gi"], "pools.mixed.shmSize: 64Gi is too small: the KV arena"),
        ("cpu", ["cluster.kvstore.control=memory://"], "cluster.kvstore.control: must be the redis:// URL of a Redis"),
        (
            "tp-pp",
            ["cluster.kvstore.tier=redis://valkey-control:6379/1"],
            "cluster.kvstore.tier: valkey-control:6379 is the address of cluster.kvstore.control too",
        ),
        (
            "tp-pp",
            ["ray.gcsFaultTolerance.enabled=true", "ray.gcsFaultTolerance.redisAddress=redis://valkey-tier"],
            "ray.gcsFaultTolerance.redisAddress: is the address of cluster.kvstore.tier too",
        ),
        (
            "cpu",
            ["cluster.pools.decode.role=prefill"],
            "cluster.pools: need a mixed pool, or a prefill and a decode pool",
        ),
        ("cpu", ["cluster.pools.prefill.role=decode"], "there is only decode"),
        ("tp", ["cluster.pools.mixed.role=decode"], "cluster.pools: need a mixed pool, or a prefill and a decode pool"),
        (
            "cpu",
            ["cluster.endpoints.grpc_port=0"],
            "cluster.endpoints.grpc_port: must be a port from 1 to 65535, not 0",
        ),
        (
            "cpu",
            ["cluster.endpoints.http_port=0"],
            "cluster.endpoints.http_port: must be a port from 1 to 65535, not 0",
        ),
        (
            "cpu",
            ["cluster.endpoints.grpc_port=8000"],
            "cluster.endpoints.http_port: port 8000 is cluster.endpoints.grpc_",
        ),
        ("cpu", ["cluster.autoscaling.max_gpus=1"], "cluster.autoscaling.max_gpus: must be 0 or at least 2, which"),
        (
            "cpu",
            ["cluster.engine.runner=fake", "cluster.pools.decode.tp=2"],
            "cluster.pools.decode: cluster.engine.run",
        ),
        ("cpu", ["images=null"], "images is required"),
        ("cpu", ["images.router=null"], "images: router is required"),
        ("cpu", ["pools=null"], "pools is required"),
        ("cpu", ["pools.decode=null"], "pools.decode: Invalid type. Expected: object, given: null"),
        ("cpu", ["cluster.pools=null"], "cluster.pools: Invalid type. Expected: object, given: null"),
        ("cpu", ["cluster.pools.decode=null"], "cluster.pools.decode: Invalid type. Expected: object, given: null"),
        (
            "cpu",
            ["poolDefaults.resources.limits.memory=null"],
            "pools.decode.resources.limits.memory: needed here or in",
        ),
        ("cpu", ["cluster.kvstore.control=redis://:pw@h:1/0"], "cluster.kvstore.control: holds a password"),
        ("cpu", ["secrets.tierTags.name="], "secrets.tierTags.name: needed where KV blocks leave a pod"),
        ("cpu", ["cluster.ray.address=h:1"], "cluster.ray.address: the chart sets it"),
        ("cpu", ["cluster.endpoints.routers=2"], "cluster.endpoints.routers: each pod is one router"),
        ("cpu", ["cluster.model.path=org/model"], "modelCache.enabled: must be true for cluster.model.path=org/model"),
        ("gitops", ["modelCache.prefetch.enabled=true"], "modelCache.prefetch.enabled: there is nothing to fetch"),
        ("cpu", ["router.autoscaling.kind=keda"], "router.autoscaling.prometheusAddress: needed with kind: keda"),
        ("cpu", ["router.autoscaling.minReplicas=11"], "router.autoscaling.minReplicas: is greater than"),
        ("cpu", ["gateway.enabled=true"], "gateway.hostnames: at least one is needed"),
        ("cpu", ["monitoring.prometheusRule.enabled=true"], "monitoring.prometheusRule.runbookUrl: needed"),
        ("locked-down", ["ray.version=2.51.0"], "ray.auth.mode: token needs Ray 2.52, and ray.version is 2.51.0"),
        ("cpu", ["ray.upgradeStrategy=NewClusterWithIncrementalUpgrade"], "ray.incrementalUpgrade: needed with"),
    ],
)
def test_values_that_cannot_work_are_refused(profile: str, settings: list[str], message: str) -> None:
    assert message in refusal(profile, *settings)


@pytest.mark.parametrize(
    "tag", ["latest", "Latest", "latest-gpu", "stable", "main", "Nightly", "dev", "EDGE", "master"]
)
@pytest.mark.parametrize("image", ["autoscaler", "ray", "router"])
def test_a_tag_that_moves_is_refused(image: str, tag: str) -> None:
    assert f"images.{image}.tag: {tag} is a tag that moves" in refusal("cpu", f"images.{image}.tag={tag}")


@pytest.mark.parametrize("settings", [("tag=main-3f2a1b",), ("tag=v1.2.3",), ("tag=main", f"digest=sha256:{'a' * 64}")])
def test_a_version_or_a_digest_names_one_image(settings: tuple[str, ...]) -> None:
    assert objects("cpu", tuple(f"images.ray.{setting}" for setting in settings))


def test_no_values_at_all_are_refused_for_want_of_a_redis() -> None:
    assert "cluster.kvstore.control: must be the redis:// URL" in refusal(None)
