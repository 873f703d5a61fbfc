"""A whole cluster without Ray and without weights: a KV node, workers with the fake engine, routers.

Every part is the real program in a process of its own that can be killed, on free ports. What the right tokens are,
`expected` in tests/fake_model.py says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from switchyard.v1 import worker_pb2, worker_pb2_grpc
from switchyard_client import (
    Finished,
    GenerationClient,
    GenerationRequest,
    PromptTokens,
    SamplingParams,
    Started,
    TokenLogprobs,
    Tokens,
)

from deploy.preflight import FoundModel
from kvstore.connect import open_directory
from kvstore.control.directory import DirectoryUnavailable
from router.adapters.config import AdaptersConfig
from router.config import RouterConfig, RouterSpec
from tests.fake_model import write_fake_model
from tests.fake_shape import NUM_BLOCKS, Shape
from tests.forked import ForkedNode, Prefork, Server
from tests.processes import DEADLINE_S, free_port, wait_until
from workers.model.identity import weights_identity
from workers.model.registry import load_config

QUICK = RouterConfig(
    directory_poll_s=0.05,
    worker_silence_s=1.0,
    new_request_wait_s=DEADLINE_S,
    replacement_wait_s=DEADLINE_S,
    max_replacements=100,
    drain_s=1.0,
)

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Answer:
    """What a client got."""

    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)  # those that came with logprobs
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # of each message with tokens
    finished: Finished | None = None

    @property
    def longest_gap_s(self) -> float:
        """Between two messages."""
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)


class FakeCluster:
    """Started when it is made; a context manager."""

    def __init__(self, prefork: Prefork, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.folder = Path(tempfile.mkdtemp(prefix="fc-"))
        if self.shape.model_dir:
            self.model_dir = Path(self.shape.model_dir)
        else:
            self.model_dir = write_fake_model(self.folder / "model", **self.shape.sizes)
        head_dim = load_config(self.model_dir).cache_specs[0].head_dim
        fragment_bytes = 2 * self.shape.block_size * head_dim * 4
        self.nodes = [
            ForkedNode(prefork, self.folder, fragment_bytes, self.shape.num_slots, f"node-{i}", self._node_options(i))
            for i in range(self.shape.hosts)
        ]
        self.node = self.nodes[0]
        self._prefork = prefork
        self._num_workers = 0
        self.workers = {
            f"{role}-{i}": Server(prefork, "worker", f"{role}-{i}", self.folder)
            for role, count in self.shape.roles.items()
            for i in range(count)
        }
        names = [f"router-{i}" for i in range(self.shape.routers)]
        self.routers = {name: Server(prefork, "router", name, self.folder) for name in names}
        self._ports = {name: (free_port(), free_port()) for name in names}
        self._clients: list[GenerationClient] = []
        try:
            for name in self.workers:
                self.start_worker(name, waits=False)
            for name in self.routers:
                self.start_router(name, waits=False)
            for server in (*self.workers.values(), *self.routers.values()):
                server.wait_ready()
            self.wait_complete()
        except BaseException:
            self.close()
            raise

    @property
    def weights(self) -> str:
        """What tells the model of this cluster from others."""
        runner = str(self.shape.engine.get("runner", "fake"))
        return weights_identity(self.model_dir, load_config(self.model_dir), runner)

    def _node_options(self, number: int) -> dict[str, object]:
        """Of a NodeSpec."""
        store: dict[str, object] = {"peer_transport": self.shape.peer_transport}
        if self.shape.disk_bytes:
            folder = self.shape.disk_dir or f"{self.folder}/disk-{number}"
            store |= {"disk_dir": folder, "disk_bytes": self.shape.disk_bytes, "disk_write": "through"}
        peer_address = f"127.0.0.1:{free_port()}" if self.shape.peers else ""
        return {"cluster": self.shape.cluster, "peer_address": peer_address, "kvstore": store}

    # ------------------------------------------------------------------------------------------------------ processes
    def node_of(self, name: str) -> ForkedNode:
        """The node of a worker's host."""
        role, _, number = name.partition("-")
        return self.nodes[(int(number) + (role == "decode")) % len(self.nodes)]

    @property
    def control_url(self) -> str:
        """Of the directory."""
        return self.shape.control or self.node.control_url

    @property
    def targets(self) -> list[str]:
        """The routers' gRPC addresses."""
        return [f"127.0.0.1:{grpc_port}" for grpc_port, _ in self._ports.values()]

    @property
    def http_urls(self) -> list[str]:
        """The routers' HTTP addresses."""
        return [f"http://127.0.0.1:{http_port}" for _, http_port in self._ports.values()]

    def start_worker(self, name: str, waits: bool = True) -> None:
        """Start it (again): as a new worker, as every restarted one is."""
        self._num_workers += 1
        spec = self.shape.worker_spec(self.model_dir, name, f"{name}.{self._num_workers}")
        spec = dataclasses.replace(
            spec,
            node_id=self.node_of(name).node_id,
            host_address=self.node_of(name).host_address if self.shape.uses_arena else "",
            control="" if name in self.shape.silent else self.control_url,
        )
        self._start(self.workers[name], dataclasses.asdict(spec), waits)

    def start_router(self, name: str, waits: bool = True) -> None:
        """Start it (again), under its old name and ports."""
        self._start(self.routers[name], dataclasses.asdict(self.router_spec(name, *self._ports[name])), waits)

    def router_spec(self, router_id: str, grpc_port: int = 0, http_port: int = 0) -> RouterSpec:
        """Of a router of this cluster."""
        return RouterSpec(
            router_id,
            str(self.model_dir),
            self.shape.model_name,
            self.control_url,
            journal=self.shape.journal or f"file://{self.folder}/streams.journal",
            grpc_port=grpc_port,
            http_port=http_port,
            config=dataclasses.replace(QUICK, **self.shape.router),
            cluster=self.shape.cluster,
            weights=self.weights,
            adapters=AdaptersConfig(enabled=bool(self.shape.adapters_root), root=self.shape.adapters_root),
            adapter_targets=FoundModel(
                str(self.model_dir), self.model_dir, load_config(self.model_dir)
            ).adapter_targets,
            adapter_registry=self.shape.control or f"file://{self.folder}/adapters.registry",
        )

    def _start(self, server: Server, spec: dict[str, object], waits: bool) -> None:
        server.start(spec)
        if waits:
            server.wait_ready()

    def restart(self, name: str) -> None:
        """Kill it if it lives, and start it again."""
        if name.startswith("node"):
            self.node_named(name).restart()
        elif name in self.workers:
            self.workers[name].kill()
            self.start_worker(name)
        else:
            self.routers[name].kill()
            self.start_router(name)

    def node_named(self, name: str) -> ForkedNode:
        """ "node" (the first) or "node-NUMBER"."""
        return self.nodes[int(name.partition("-")[2] or 0)]

    def server(self, name: str) -> Server:
        """A worker or router by its name."""
        return self.workers[name] if name in self.workers else self.routers[name]

    def kill(self, name: str) -> None:
        """SIGKILL."""
        if name.startswith("node"):
            self.node_named(name).kill()
        else:
            self.server(name).kill()

    def wait_complete(self) -> None:
        """Until every router that runs sees every worker that runs, and no other."""
        wanted = {server.ready["worker_id"] for server in self.workers.values() if server.is_running}
        if self.routers:  # a directory that lost its memory lists nobody at first
            wait_until(lambda: wanted <= self._leased(), f"the directory has {wanted}")
        for name, url in zip(self.routers, self.http_urls, strict=True):
            if self.routers[name].is_running:
                wait_until(lambda url=url: self.seen_by(url) == wanted, f"{name} sees {wanted}")

    def _leased(self) -> set[str]:
        """The workers that the directory has."""
        with contextlib.closing(open_directory(self.control_url, self.shape.cluster)) as directory:
            try:
                return {worker.record.worker_id for worker in directory.workers()}
            except DirectoryUnavailable:
                return set()

    def readyz(self, url: str) -> dict[str, Any]:
        """What a router says of the cluster; nothing while it is away."""
        try:
            with _OPENER.open(f"{url}/readyz", timeout=5) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        except OSError:
            return {}
        state: dict[str, Any] = json.loads(body)
        return state

    def seen_by(self, url: str) -> set[str]:
        """The workers that a router has."""
        return {worker["worker_id"] for worker in self.readyz(url).get("workers", ())}

    def load(self, name: str) -> worker_pb2.WorkerLoad:
        """A worker's counters now."""
        with grpc.insecure_channel(self.workers[name].ready["address"]) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            return stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=DEADLINE_S).load

    # -------------------------------------------------------------------------------------------------------- streams
    def client(self, first: int = 0) -> GenerationClient:
        """A resuming client that asks the router of that number first."""
        client = GenerationClient([*self.targets[first:], *self.targets[:first]], resume_within_s=DEADLINE_S)
        self._clients.append(client)
        return client

    def ask(
        self,
        client: GenerationClient,
        prompt: Sequence[int],
        num_tokens: int,
        on_tokens: Callable[[Answer], None] = lambda answer: None,
        temperature: float = 0.0,
        seed: int = 1,
        model: str = "",
        cache_salt: bytes = b"",
        **options: Any,
    ) -> Answer:
        """One stream to its end. model: name of an adapter. options: more of SamplingParams."""
        answer = Answer(prompt)
        values = {"temperature": temperature, "max_tokens": num_tokens, "ignore_eos": True, "seed": seed, **options}
        sampling = SamplingParams(**values)
        for event in client.generate(GenerationRequest(tuple(prompt), sampling, model, cache_salt=cache_salt)):
            if isinstance(event, Started):
                answer.times_s.append(time.monotonic())
            elif isinstance(event, PromptTokens):
                assert event.first_position == len(answer.prompt_ids), "a token of the prompt was lost or doubled"
                answer.prompt_ids += event.ids
                answer.prompt_logprobs += event.logprobs
            elif isinstance(event, Tokens):
                assert event.first_position == len(answer.ids), "a token was lost or doubled"
                answer.ids += event.ids
                answer.text += event.text
                answer.logprobs += event.logprobs
                answer.times_s.append(time.monotonic())
                on_tokens(answer)
            else:
                answer.finished = event
        assert answer.finished is not None, "a stream without an end"
        return answer

    def wait_at_rest(self) -> None:
        """Until no worker holds a request, a block or a wait; fails when that does not come."""
        for name, server in self.workers.items():
            if server.is_running:
                wait_until(lambda name=name: self.is_at_rest(name), f"{name} is at rest")

    def is_at_rest(self, name: str) -> bool:
        """Whether all of a worker's blocks are free and nothing runs."""
        load = self.load(name)
        num_blocks = self.shape.engine.get("num_blocks", NUM_BLOCKS)
        busy = load.num_running + load.num_waiting + load.num_waiting_for_kv + load.num_queued_tokens
        return busy == 0 and load.num_free_blocks == num_blocks

    # ------------------------------------------------------------------------------------------------------------ end
    def close(self) -> None:
        """Ends every process and removes every file."""
        for client in self._clients:
            client.close()
        for server in (*self.routers.values(), *self.workers.values()):
            server.kill()
        for node in self.nodes:
            node.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
