"""Clusters that share a Redis, and models that change under it: no client gets an answer of another one."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file
from switchyard.v1 import generation_pb2, generation_pb2_grpc, worker_pb2, worker_pb2_grpc
from switchyard_client import GenerationError

from checkpoint.identity import ServedModel, tokenizer_digest
from kvstore.control.directory import DirectoryUnavailable
from kvstore.control.remote_directory import RemoteDirectory
from kvstore.tiers.host.host_tier import HostTier
from tests.deploy.conftest import write_tiny_model
from tests.fake_cluster import _OPENER, FakeCluster
from tests.processes import RedisServer, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.redis, pytest.mark.timeout(300)]

Make = Callable[..., FakeCluster]
PROMPT = list(range(1, 41))
NUM_TOKENS = 24
NUM_FRAGMENTS = 2 * 4 * 2  # of the prompt: full blocks, layers, heads


def workers_of(cluster: FakeCluster) -> set[str]:
    return {server.ready["worker_id"] for server in cluster.workers.values()}


def test_clusters_with_one_redis_use_their_own_workers(
    fake_cluster: Make, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Of 24 requests to one cluster 15 were answered by the other's worker."""
    shared = {"control": redis_server.url, "tier": redis_server.url, "journal": redis_server.url, "routers": 1}
    one = fake_cluster(prefill=0, decode=0, mixed=1, cluster="one", model_name="a", **shared)
    two = fake_cluster(prefill=0, decode=0, mixed=2, cluster="two", model_name="b", **shared)
    for cluster in (one, two):
        client, seen = cluster.client(), set()
        for number in range(24):
            finished = cluster.ask(client, [number + 1, *PROMPT], 4).finished
            assert finished is not None
            seen.add(finished.stats.decode_worker_id)
        assert seen <= workers_of(cluster)
        assert cluster.readyz(cluster.http_urls[0])["workers_refused"] == []
    with redis_server.client() as client:
        prefixes = {key.split(b"{")[0] for key in client.keys("switchyard:*")}
        prefixes = {prefix for prefix in prefixes if not prefix.startswith(b"switchyard:kv")}
    allowed = tuple(
        f"switchyard:{kind}1:{name}:".encode() for kind in ("control", "journal") for name in ("one", "two")
    )
    assert prefixes
    assert all(prefix.startswith(allowed) for prefix in prefixes)


def test_workers_of_another_model_under_the_same_name_are_refused_and_named(
    fake_cluster: Make, redis_server: RedisServer
) -> None:
    """Somebody gave two clusters one name: they do not mix, and say so."""
    one = fake_cluster(
        prefill=0, decode=0, mixed=1, routers=1, cluster="same", model_name="a", control=redis_server.url
    )
    other = fake_cluster(
        prefill=0, decode=1, mixed=0, routers=0, cluster="same", model_name="b", control=redis_server.url
    )
    (stranger,) = workers_of(other)
    wait_until(lambda: bool(one.readyz(one.http_urls[0])["workers_refused"]), "the stranger is refused")
    state = one.readyz(one.http_urls[0])
    assert [entry["worker_id"] for entry in state["workers_refused"]] == [stranger]
    assert state["workers_refused"][0]["reason"] == "it serves something else: model: b there, a here"
    assert state["is_ready"]
    assert state["is_degraded"]
    for number in range(12):
        finished = one.ask(one.client(), [number + 1, *PROMPT], 4).finished
        assert finished is not None
        assert finished.stats.decode_worker_id in workers_of(one)


def test_a_stream_is_not_resumed_where_something_else_is_served(fake_cluster: Make, redis_server: RedisServer) -> None:
    shared = {"control": redis_server.url, "journal": redis_server.url, "routers": 1}
    one = fake_cluster(prefill=0, decode=0, mixed=1, cluster="same", model_name="a", **shared)
    with grpc.insecure_channel(one.targets[0]) as channel:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=PROMPT), sampling=generation_pb2.SamplingParams(max_tokens=8)
        )
        stream_id = list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request))[-1].stream_id
    one.close()
    for name, cluster_name in (("b", "same"), ("a", "other")):
        other = fake_cluster(prefill=0, decode=0, mixed=1, cluster=cluster_name, model_name=name, **shared)
        with grpc.insecure_channel(other.targets[0]) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Resume(generation_pb2.ResumeRequest(stream_id=stream_id, num_tokens=0)))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        other.close()
    again = fake_cluster(prefill=0, decode=0, mixed=1, cluster="same", model_name="a", **shared)
    with grpc.insecure_channel(again.targets[0]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert list(stub.Resume(generation_pb2.ResumeRequest(stream_id=stream_id, num_tokens=0)))[-1].finished


def test_fragments_of_other_weights_are_never_used(
    fake_cluster: Make, redis_server: RedisServer, tmp_path: Path
) -> None:
    """A Redis that outlived the restart gave the old weights' KV to a v_proj that was changed in place, between two of
    the 256 bytes of the file that once counted."""
    directory = write_tiny_model(tmp_path / "model", intermediate_size=16384)
    weights = directory / "model.safetensors"
    shape = {"prefill": 0, "decode": 0, "mixed": 1, "routers": 1, "uses_arena": False, "block_size": 16}
    shape |= {"model_dir": str(directory), "engine": {"runner": "torch"}, "cluster": "c"}

    def answer(tier: str) -> tuple[list[int], int]:
        cluster = fake_cluster(**shape, tier=tier, control=tier)
        got = cluster.ask(cluster.client(), PROMPT, NUM_TOKENS, temperature=1.0)  # random weights: greedy repeats
        assert got.finished is not None
        if tier:  # what is written back beside the steps is there for the next start
            with redis_server.client() as client:
                wait_until(lambda: len(client.keys("switchyard:kv*")) >= NUM_FRAGMENTS, "the prompt's KV is kept")
        cluster.close()
        return got.ids, got.finished.stats.num_cached_prompt_tokens

    before, num_cached = answer(redis_server.url)
    assert num_cached == 0
    assert answer(redis_server.url) == (before, len(PROMPT) // 16 * 16)  # the tier outlives the cluster
    time.sleep(2.1)  # files that were just written are not remembered; this one was
    change_between_samples(weights)
    expected, _ = answer("")
    assert expected != before
    assert answer(redis_server.url) == (expected, 0)


def change_between_samples(path: Path) -> None:
    """Negate values of a v_proj where the digest of earlier versions did not look."""
    size = path.stat().st_size
    sampled = [max(0, size - (64 << 10)) * i // 255 for i in range(256)]
    with path.open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        for layer in range(4):
            begin, end = header[f"model.layers.{layer}.self_attn.v_proj.weight"]["data_offsets"]
            first, last = begin + 8 + header_bytes, end + 8 + header_bytes
            if all(start + (64 << 10) <= first or start >= last for start in sampled):
                file.seek(first)
                old = file.read(last - first)
                file.seek(first)
                file.write(bytes(byte ^ 0x80 if i % 4 == 3 else byte for i, byte in enumerate(old)))
                return
    raise AssertionError("each v_proj was sampled: choose another size")


def tier_metric(url: str, name: str, tier: str) -> float:
    with _OPENER.open(f"{url}/metrics", timeout=5) as metrics:
        rows = metrics.read().decode().splitlines()
    (row,) = [r for r in rows if r.startswith(f"switchyard_worker_tier_{name}{{") and f'tier="{tier}"' in r]
    return float(row.rpartition(" ")[2])


def test_a_disk_that_cannot_be_kept_is_said(fake_cluster: Make, tmp_path: Path) -> None:
    """It served without the disk, and reported nothing: no warning, not degraded, no metric."""
    (tmp_path / "file").write_text("")
    cluster = fake_cluster(
        prefill=0, decode=0, mixed=1, routers=1, disk_bytes=64 << 20, disk_dir=str(tmp_path / "file" / "disk")
    )
    url = cluster.http_urls[0]
    wait_until(lambda: "Not a directory" in str(cluster.readyz(url)["tiers_down"]), "the disk is missing")
    (down,) = cluster.readyz(url)["tiers_down"]
    assert down["tier"] == "disk"
    assert down["reason"].startswith(f"{tmp_path}/file/disk: ")
    assert cluster.readyz(url)["is_degraded"]
    assert tier_metric(url, "up", "disk") == tier_metric(url, "ok", "disk") == 0
    (tmp_path / "file").unlink()
    wait_until(lambda: not cluster.readyz(url)["is_degraded"], "the disk is there")


def test_a_redis_that_takes_nothing_is_said(fake_cluster: Make, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "reset", "on", ">hush", "+@read", "+@connection", "~*")
        tier = redis_server.url.replace("redis://", "redis://reader:hush@")
        cluster = fake_cluster(prefill=0, decode=0, mixed=1, routers=1, tier=tier)
        url = cluster.http_urls[0]
        wait_until(lambda: bool(cluster.readyz(url)["tiers_down"]), "Redis refuses fragments")
        (down,) = cluster.readyz(url)["tiers_down"]
        assert (down["tier"], "permissions" in down["reason"]) == ("redis", True)
        assert (tier_metric(url, "up", "redis"), tier_metric(url, "ok", "redis")) == (1, 0)
        client.execute_command("ACL", "SETUSER", "reader", "+@all")
        wait_until(lambda: not cluster.readyz(url)["is_degraded"], "it has the right")
        client.execute_command("ACL", "DELUSER", "reader")


def test_a_node_of_another_cluster_refuses_workers_and_routers(fake_cluster: Make) -> None:
    cluster = fake_cluster(prefill=0, decode=0, mixed=1, routers=1, cluster="one")
    why = "this KV node is of cluster 'one', the caller of 'two'"
    host = HostTier(cluster.node.host_address, "two")
    assert not host.is_up
    assert host.problem == why
    host.close()
    directory = RemoteDirectory(cluster.node.control_url.removeprefix("memory://"), "two")
    with pytest.raises(DirectoryUnavailable, match=why):
        directory.workers()
    directory.close()
    served = ServedModel("two", cluster.shape.model_name, cluster.weights, tokenizer_digest(cluster.model_dir))
    hello = worker_pb2.RouterHello(router_id="stranger", epoch=1, served=served.message())
    with grpc.insecure_channel(cluster.workers["mixed-0"].ready["address"]) as channel:
        answers = worker_pb2_grpc.WorkerServiceStub(channel).Connect(iter([worker_pb2.ConnectRequest(hello=hello)]))
        assert next(answers).hello.served.cluster == "one"
        with pytest.raises(grpc.RpcError) as refused:
            next(answers)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.details() == "router stranger serves something else: cluster: two there, one here"


def test_an_overflow_is_an_error_and_not_an_empty_answer(fake_cluster: Make, tmp_path: Path) -> None:
    """Finite weights whose logits are not, in float16: token 0 stands first among NaNs, and may be the end of text."""
    directory = write_tiny_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 6e4)
    save_file(tensors, directory / "model.safetensors")
    engine = {"runner": "torch", "dtype": "float16"}
    cluster = fake_cluster(
        prefill=0,
        decode=0,
        mixed=1,
        routers=1,
        model_dir=str(directory),
        block_size=16,
        engine=engine,
        router={"max_replacements": 1, "replacement_wait_s": 1.0},
    )
    with pytest.raises(GenerationError, match="logits are no finite numbers"):
        cluster.ask(cluster.client(), PROMPT, NUM_TOKENS)
    cluster.wait_at_rest()
