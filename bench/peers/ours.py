"""Our side of the peer table: the whole cluster with one mixed worker, asked over gRPC through its router."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from switchyard_client import GenerationClient, GenerationRequest, SamplingParams, Tokens

from bench.cluster import cluster
from bench.direct import DirectWorker, connect
from bench.peers.workload import Call, Completion, check

NAME = "switchyard"


@dataclass(frozen=True, slots=True)
class OurOptions:
    """How the cluster is started."""

    dtype: str
    num_threads: int
    settings: Sequence[str] = ()  # as after --set


class OurCluster:
    """A running cluster and a client of it, whose connection stays open from call to call."""

    def __init__(self, runner: asyncio.Runner, client: GenerationClient, worker: DirectWorker) -> None:
        self._runner = runner
        self._client = client
        self._worker = worker

    def run(self, call: Call) -> Sequence[Completion]:
        """All prompts of the call at once, as a client sees them."""
        completions = self._runner.run(self._run(call))
        check(call, completions)
        return completions

    async def _run(self, call: Call) -> Sequence[Completion]:
        options = SamplingParams(temperature=0.0, max_tokens=call.max_tokens, ignore_eos=True)

        async def one(prompt: Sequence[int]) -> Completion:
            first_s = end_s = 0.0
            ids: list[int] = []
            async for event in self._client.generate_async(GenerationRequest(prompt, options)):
                if isinstance(event, Tokens):
                    end_s = time.perf_counter() - began_s
                    first_s = first_s or end_s
                    ids.extend(event.ids)
            return Completion(first_s, end_s, ids)

        began_s = time.perf_counter()
        return await asyncio.gather(*(one(prompt) for prompt in call.prompts))

    def step_seconds(self) -> tuple[float, int]:
        """Time in engine steps, and their number, since the worker began."""
        load = self._worker.load()
        return load.step_seconds, load.num_steps


@contextmanager
def our_cluster(model_dir: Path, options: OurOptions) -> Iterator[OurCluster]:
    """Until the block ends. Nothing of it may run while a peer is measured: an idle cluster uses the CPU too."""
    chosen = [f"model.dtype={options.dtype}", f"pools.mixed.num_threads={options.num_threads}", *options.settings]
    sets = [part for setting in chosen for part in ("--set", setting)]
    with cluster("--model", str(model_dir), "--mixed", "1", *sets) as target:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any proxy
        with opener.open(f"http://{target.http}/readyz") as answer:
            address = json.load(answer)["workers"][0]["address"]
        with connect(address) as worker, asyncio.Runner() as runner:
            client = GenerationClient(target.grpc)
            try:
                yield OurCluster(runner, client, worker)
            finally:
                runner.run(client.aclose())
