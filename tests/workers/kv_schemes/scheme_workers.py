"""The workers of one scheme of the paged cache, each a process that is started when a test first needs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from switchyard.v1 import worker_pb2

from kvstore.config import KVStoreConfig
from tests.processes import KVNode
from tests.workers.forked_worker import ALWAYS, spec_for, worker
from tests.workers.worker_client import WorkerClient
from workers.config import WorkerSpec
from workers.kv.grid import FragmentGrid
from workers.kv.schemes.named import scheme_of
from workers.model.registry import load_config

BLOCK_SIZE = 16
KV_HEADS = 2


def scheme_spec(checkpoint: Path, role: str, node: KVNode, kv_cache_dtype: str, **options: object) -> WorkerSpec:
    """Batch-invariant, in a context so short that windows of 128 tokens fit into few blocks."""
    engine = {name: options.pop(name) for name in ("num_blocks",) if name in options}
    spec = spec_for(checkpoint, role, node, **options)
    exact = {"batch_invariant": True, "kv_cache_dtype": kv_cache_dtype, "max_model_len": 112, **engine}
    return replace(spec, engine=replace(spec.engine, **exact))


def mixed(client: WorkerClient, stream_id: str, token_ids: list[int], max_tokens: int) -> list[int]:
    """The tokens of a request that one worker takes from its beginning to its end."""
    client.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_MIXED, max_tokens=max_tokens)
    client.wait_finished(stream_id)
    return client.tokens[stream_id]


@dataclass
class SchemeWorkers:
    """Tests of one scheme share these, and bring prompts of their own."""

    checkpoint: Path
    node: KVNode
    kv_cache_dtype: str
    stack: ExitStack
    running: dict[str, WorkerClient] = field(default_factory=dict)
    num_streams: int = 0

    def spec(self, role: str, **options: object) -> WorkerSpec:
        """Of a worker on the node that all tests share."""
        return scheme_spec(self.checkpoint, role, self.node, self.kv_cache_dtype, **options)

    @property
    def prefill(self) -> WorkerClient:
        """Half of a disaggregated pair."""
        return self._worker("prefill", self.spec("prefill"))

    @property
    def decode(self) -> WorkerClient:
        """The other half."""
        return self._worker("decode", self.spec("decode"))

    @property
    def mixed(self) -> WorkerClient:
        """One that pulls whatever prefix the tiers have."""
        return self._worker("mixed", replace(self.spec("mixed", kvstore=ALWAYS), worker_id=f"mixed-{id(self)}"))

    def undisturbed(self, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        """The tokens of a worker alone, without tiers, one request after the other."""
        alone = replace(self.spec("mixed"), worker_id="alone", host_address="", control="", kvstore=KVStoreConfig())
        alone = replace(alone, engine=replace(alone.engine, num_blocks=64, enable_prefix_caching=False))
        client = self._worker("alone", alone)
        first = self.num_streams
        self.num_streams += len(prompts)
        return [mixed(client, f"r{first + i}", token_ids, max_tokens) for i, token_ids in enumerate(prompts)]

    def grids(self, has_sinks: bool = True) -> list[FragmentGrid]:
        """Of each cache group, or of those that keep more than the first tokens: a layer in each fragment."""
        engine = self.spec("mixed").engine
        groups = scheme_of(engine).groups(load_config(self.checkpoint).cache_specs)
        return [
            FragmentGrid(group.layers, 1, 0, KV_HEADS, group.level)
            for group in groups
            if has_sinks or not group.first_tokens
        ]

    def _worker(self, name: str, spec: WorkerSpec) -> WorkerClient:
        if name not in self.running:
            self.running[name] = self.stack.enter_context(worker(spec))
        return self.running[name]
