"""Runs engines on a tp x pp group of processes that is started once and reused for many jobs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from tests.workers.forked_ranks import context, start_rank
from workers.config import EngineConfig
from workers.engine.adapters.ref import AdapterRef
from workers.engine.engine import Engine, StepEvents
from workers.engine.request import Pooling, Request, RequestEnd, RequestRole, TokenOutput
from workers.engine.speculation import SpeculationCounters
from workers.engine.step import ModelRunnerOutput, SchedulerOutput, StepPlan, TransferDone
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.batching import PreparedBatch
from workers.runtime.build import make_engine
from workers.runtime.coordination.executor import GroupExecutor, follow
from workers.runtime.drafting.build import feature_layers, load_draft, make_speculator
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams, TokenLogprobs
from workers.sampling.row_reports import Reported
from workers.speculation.drafters.drafter import Drafter
from workers.speculation.speculator import Speculator


@dataclass(frozen=True)
class JobResult:
    """Completions in the prompts' order, and what it took."""

    completions: list[list[int]]
    num_preemptions: int
    num_cached_prompt_tokens: int
    num_computed_prompt_tokens: int
    logits: list[Tensor]  # [tokens, the leader's share of the vocabulary] of each completion; none where pp > 1
    logprobs: list[list[TokenLogprobs | None]] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprobs | None]] = field(default_factory=list)  # one per token; None: none came
    embeddings: list[Sequence[float]] = field(default_factory=list)  # of requests that are embeddings
    speculation: SpeculationCounters | None = None
    ends: list[RequestEnd] = field(default_factory=list)
    adapter_counts: tuple[int, int, int] = (0, 0, 0)  # hits, copies, reads


class RecordingRunner(TorchModelRunner):
    """Keeps the logits that each token was chosen from, in the order in which they were wanted."""

    logits: list[list[Tensor]]  # of each step

    def start(self, plan: StepPlan, ended: Sequence[TransferDone] = ()) -> Callable[[], ModelRunnerOutput]:
        self.logits.append([])
        return super().start(plan, ended)

    def _choose(
        self, logits: Tensor, hidden: Tensor | None, prepared: PreparedBatch, reported: Reported
    ) -> tuple[Tensor, Tensor | None]:
        by_index = {index: row.clone() for row, index in zip(logits, prepared.order.tolist(), strict=True)}
        self.logits[-1] = [by_index[index] for index in sorted(by_index)]
        return super()._choose(logits, hidden, prepared, reported)


class RecordingExecutor(GroupExecutor):
    """Records which logits each step needs."""

    def __init__(self, runner: TorchModelRunner, groups: ParallelGroups, num_threads: int | None) -> None:
        super().__init__(runner, groups, num_threads)
        self.wanted: list[list[str]] = []  # of each step: request ids

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        wanted = zip(plan.requests, plan.num_logits, strict=True)
        self.wanted.append([request.request_id for request, count in wanted for _ in range(count)])
        return super().start(plan)


def run_to_end(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    """The ids of outputs_to_end."""
    outputs = outputs_to_end(engine, requests)
    return {request_id: [token.token_id for token in tokens] for request_id, tokens in outputs.items()}


def outputs_to_end(
    engine: Engine, requests: Sequence[Request], on_events: Callable[[StepEvents], None] = lambda events: None
) -> dict[str, list[TokenOutput]]:
    """All tokens of all requests; the engine must come to rest with its books in order."""
    tokens: dict[str, list[TokenOutput]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.submit(request)
    for _ in range(10_000):
        events = engine.step()
        if events is None and not engine.scheduler.transfers:
            break
        if events is not None:
            on_events(events)
        else:
            time.sleep(0.001)  # an adapter is being read
        for token in events.tokens if events is not None else ():
            assert token.position == len(tokens[token.request_id]), "positions follow each other without gaps"
            tokens[token.request_id].append(token)
    assert not engine.scheduler.has_work()
    engine.scheduler.pool.check()
    assert engine.scheduler.pool.num_referenced == 0
    engine.scheduler.adapters.check()
    return tokens


def run_on(
    engine: Engine, requests: Sequence[Request], per_step: int = 2
) -> tuple[dict[str, list[int]], dict[str, RequestEnd]]:
    """To the end of all of them, however they end."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    ends: dict[str, RequestEnd] = {}
    coming = list(requests)
    for _ in range(3000):
        for new in coming[:per_step]:
            engine.submit(new)
        del coming[:per_step]
        events = engine.step()
        if events is None and not coming and not engine.scheduler.has_work():
            break
        if events is None:
            time.sleep(0.0005)  # what moves beside the steps, does so in other threads
        for token in events.tokens if events else ():
            assert token.position == len(tokens[token.request_id])
            tokens[token.request_id].append(token.token_id)
        ends.update((end.request_id, end) for end in (events.ended if events else ()))
    assert set(ends) == set(tokens)
    assert engine.scheduler.pool.num_referenced == 0
    engine.scheduler.pool.check()
    return tokens, ends


Sampling = SamplingParams | Sequence[SamplingParams | Pooling]  # of all requests, or of each; a pooling: an embedding


def make_request(
    number: int, prompt: Sequence[int], wanted: SamplingParams | Pooling, adapter: AdapterRef | None = None
) -> Request:
    name, arrival_s = f"r{number}", float(number)
    if isinstance(wanted, SamplingParams):
        return Request(name, list(prompt), len(prompt), wanted, arrival_time_s=arrival_s, adapter=adapter)
    sampling = SamplingParams(max_tokens=1)
    return Request(
        name, list(prompt), len(prompt), sampling, RequestRole.EMBED, arrival_time_s=arrival_s, pooling=wanted
    )


def run_job(
    config: EngineConfig,
    groups: ParallelGroups,
    prompts: list[list[int]],
    sampling: Sampling,
    adapters: Sequence[AdapterRef | None] = (),
    drafter: Drafter | None = None,
) -> JobResult | None:
    """One rank's part of a job; the leader returns the result. drafter: in place of the config's own; every step takes
    all that it proposes. Layers are compiled where the config says so: where nothing was compiled before, it takes a
    minute."""
    if config.compile is None:
        config = replace(config, compile=False)
    model = load_config(config.model_dir, config.ignore_keys, config.plugins)
    layers = feature_layers(config, groups.shard)
    runner = RecordingRunner(config, model, groups, torch.device("cpu"), feature_layers=layers)
    runner.logits = []
    runner.warm_up()
    runner.logits.clear()
    if groups.shard.rank != 0:
        follow(runner, groups)
        return None
    executor = RecordingExecutor(
        runner, groups, config.num_threads if config.async_scheduling or config.pp > 1 else None
    )
    speculation = speculation_of(config, runner, drafter)
    engine = make_engine(config, model, runner, executor, b"names", lambda: 0.0, speculation=speculation)
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    wanted = zip(prompts, params, adapters or [None] * len(prompts), strict=True)
    requests = [make_request(i, p, s, a) for i, (p, s, a) in enumerate(wanted)]
    of_prompts: dict[str, list[TokenLogprobs | None]] = {r.request_id: [None] * r.num_prompt_tokens for r in requests}

    embeddings: dict[str, Sequence[float]] = {}
    ends: dict[str, RequestEnd] = {}

    def note(events: StepEvents) -> None:
        ends.update({end.request_id: end for end in events.ended})
        embeddings.update({end.request_id: end.embedding for end in events.ended})
        for found in events.prompt_logprobs:
            end = found.first_position + len(found.logprobs)
            of_prompts[found.request.request_id][found.first_position : end] = found.logprobs

    tokens = outputs_to_end(engine, requests, note)
    engine.close()
    runner.close()
    logits: dict[str, list[Tensor]] = {r.request_id: [] for r in requests}
    for wanted_ids, rows in zip(executor.wanted, runner.logits, strict=True):
        for request_id, row in zip(wanted_ids, rows, strict=False):  # none where another stage has them
            logits[request_id].append(row)
    has_logits = groups.shard.pp == 1 and speculation is None  # of drafts there are more rows than tokens
    return JobResult(
        [[token.token_id for token in tokens[f"r{i}"]] for i in range(len(prompts))],
        engine.scheduler.num_preemptions,
        engine.counters.num_cached_prompt_tokens,
        engine.counters.num_computed_prompt_tokens,
        [torch.stack(logits[f"r{i}"]) for i in range(len(prompts)) if logits[f"r{i}"]] if has_logits else [],
        [[token.logprobs for token in tokens[f"r{i}"]] for i in range(len(prompts))],
        [of_prompts[f"r{i}"] for i in range(len(prompts))],
        [embeddings[f"r{i}"] for i in range(len(prompts))],
        None if speculation is None else speculation.counters,
        [ends[f"r{i}"] for i in range(len(prompts))],
        (engine.scheduler.adapters.num_hits, engine.scheduler.adapters.num_copies, engine.scheduler.adapters.num_reads),
    )


def speculation_of(config: EngineConfig, runner: TorchModelRunner, drafter: Drafter | None) -> Speculator | None:
    """What proposes drafts: the drafter, or what the config says."""
    if drafter is not None:
        return Speculator(replace(config.speculative, num_speculative_tokens=16), [drafter], None, lambda: 0.0)
    return make_speculator(config, runner, load_draft(config, torch.device("cpu")), None)


def _rank_process(rank: int, tp: int, pp: int, url: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    groups = ParallelGroups.connect(Shard.of_rank(rank, tp, pp), torch.device("cpu"), url, "lo")
    while (job := pipe.recv()) is not None:
        result = run_job(job[0], groups, *job[1:])
        if rank == 0:
            pipe.send(result)
    groups.close()


class EngineGroup:
    """tp x pp processes; a context manager."""

    def __init__(self, tp: int, pp: int) -> None:
        self.tp, self.pp = tp, pp
        self._meeting = tempfile.TemporaryDirectory()
        url = f"file://{self._meeting.name}/meeting"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(tp * pp):
            ours, theirs = context().Pipe()
            self._processes.append(start_rank(_rank_process, rank, tp, pp, url, theirs))
            theirs.close()
            self._pipes.append(ours)

    def __enter__(self) -> EngineGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()
        self._meeting.cleanup()

    def run(
        self,
        config: EngineConfig,
        prompts: list[list[int]],
        sampling: Sampling,
        adapters: Sequence[AdapterRef | None] = (),
        drafter: Drafter | None = None,
    ) -> JobResult:
        """One job on all ranks. adapters: of each request; none: of no request. drafter: as in run_job."""
        for pipe in self._pipes:
            pipe.send((config, prompts, sampling, adapters, drafter))
        if not self._pipes[0].poll(120):
            raise TimeoutError(f"no result from tp={self.tp} pp={self.pp}")
        return self._pipes[0].recv()
