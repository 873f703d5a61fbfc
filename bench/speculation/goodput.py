"""Speculation under a load that rises past the point where drafts pay, in virtual time: the engine that workers run,
over an executor whose steps take as long as the roofline of a named GPU says.

    python -m bench.speculation.goodput            # a table: fixed numbers of draft tokens beside the adaptive budget

Requests come ever more often. Each has an acceptance of its own, which the engine does not know. While few run, a step
waits for the weights, and drafts are nearly free; when many run it waits for the arithmetic, and each wrong draft costs
time.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.rows import Measurement
from costs.hardware import GPUS
from costs.model import DecoderSizes, model_step
from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.config import SpeculativeOptions
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.step import ModelRunnerOutput, SchedulerOutput
from workers.sampling.params import SamplingParams
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.speculator import Speculator
from workers.speculation.step_costs import StepCosts, lengths_of, sizes_to_measure

SHAPE = DecoderSizes(4096, 14336, 32, 32, 8, 128, 128_256)  # Llama 3.1 8B
GPU, DTYPE_BYTES = "h200", 2
REACHED_MEMORY, REACHED_FLOPS, OVERHEAD_S = 0.8, 0.6, 5e-4  # shares of the GPU's limits; of each step
DRAFT_SHARE = 0.06  # of a step of the model with one token of each sequence, what one of the draft model takes
MAX_NUM_SEQS, MAX_TOKENS = 512, 4096
PROMPT_TOKENS, OUTPUT_TOKENS = 400, 200
WINDOW_S, RATES = 15.0, (4.0, 16.0, 48.0, 96.0, 144.0)  # requests a second, in each window
FIXED = (0, 2, 4, 8)
VOCABULARY = 1000


def step_s(query_lens: Sequence[int], seq_lens: Sequence[int], num_logits: int) -> float:
    """Of a step, by the GPU's roofline."""
    cost, gpu = model_step(SHAPE, query_lens, seq_lens, num_logits, DTYPE_BYTES), GPUS[GPU]
    memory_s = cost.memory_bytes / (REACHED_MEMORY * gpu.memory_bytes_per_s)
    return OVERHEAD_S + max(memory_s, cost.flops / (REACHED_FLOPS * gpu.bf16_flops_per_s))


def token_at(request_id: str, position: int) -> int:
    """What the model chooses."""
    return (int(request_id[1:]) + 7919 * position) % VOCABULARY


class VirtualGpu:
    """Chooses the tokens of token_at, and takes as long as step_s."""

    has_ended_transfers = False

    def __init__(self) -> None:
        self.now_s = 0.0

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """One step; its end is when it is asked for."""

        def result() -> ModelRunnerOutput:
            chosen: list[int] = []
            for chunk in plan.chunks():
                end = chunk.start_position + chunk.num_scheduled_tokens
                chosen += [token_at(chunk.request.request_id, at) for at in range(end - chunk.num_logits + 1, end + 1)]
            ends = [start + count for start, count in zip(plan.start_positions, plan.num_tokens, strict=True)]
            self.now_s += step_s(plan.num_tokens, ends, sum(plan.num_logits))
            return ModelRunnerOutput(chosen)

        return result

    def resend(self) -> None:
        """There is one rank."""

    def recover(self) -> str:
        """No step fails here."""
        return ""

    def stop(self) -> None:
        """Nothing runs."""


class VirtualDraft:
    """Right at each position with the request's own chance; each of its steps takes a share of one of the model for as
    many sequences."""

    def __init__(self, gpu: VirtualGpu) -> None:
        self._gpu = gpu
        self._step_s = [DRAFT_SHARE * step_s([1] * n, [PROMPT_TOKENS] * n, n) for n in range(MAX_NUM_SEQS + 1)]

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter."""
        self._gpu.now_s += self.draft_s([one.num_tokens for one in wanted])
        return [self._of(one.request, one.num_tokens) for one in wanted]

    def _of(self, request: Request, count: int) -> Sequence[int]:
        chance = random.Random(f"{request.request_id}/{request.num_tokens}")
        first = request.num_tokens
        coming = [token_at(request.request_id, first + i) for i in range(count)]
        return [t if chance.random() < acceptance_of(request.request_id) else VOCABULARY for t in coming]

    def prepare(self, requests: Sequence[Request]) -> None:
        """As in Drafter."""

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter."""

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter: here steps do not overlap."""

    def forget(self, request: Request) -> None:
        """As in Drafter."""

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return True

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        counts = [sum(length > step for length in lengths) for step in range(max(lengths, default=0))]
        return sum(self._step_s[count] for count in counts)


def acceptance_of(request_id: str) -> float:
    """Between 0.2 and 0.9."""
    return 0.2 + 0.7 * random.Random(request_id).random()


@dataclass(frozen=True, slots=True)
class WindowOutcome:
    """Of the requests that came in one window."""

    rate: float  # requests a second
    tpot_p50_s: float  # of the requests' means
    tpot_p95_s: float
    tokens_per_s: float  # that all streams got while the window lasted
    num_running: float  # mean


def measure(num_tokens: int | None) -> list[WindowOutcome]:
    """num_tokens: draft tokens of each request in each step; None: the adaptive budget."""
    gpu = VirtualGpu()
    options = SpeculativeOptions(
        method="none",
        num_speculative_tokens=8 if num_tokens is None else num_tokens,
        enable_adaptive_verification=num_tokens is None,
    )
    measured = {}
    for batch, drafts in sizes_to_measure(MAX_NUM_SEQS, MAX_TOKENS):
        lengths = lengths_of(batch, drafts)
        measured[batch, drafts] = step_s(lengths, [PROMPT_TOKENS + length for length in lengths], sum(lengths))
    clock = lambda: gpu.now_s  # noqa: E731
    speculation = None if num_tokens == 0 else Speculator(options, [VirtualDraft(gpu)], StepCosts(measured), clock)
    pools = BlockPools([BlockPool(100_000, 16, enable_prefix_caching=False)])
    config = SchedulerConfig(MAX_NUM_SEQS, MAX_TOKENS, 4096)
    engine = Engine(
        Scheduler(config, pools, b"f" * 16, frozenset()), gpu, 2 * VOCABULARY, clock, speculation=speculation
    )
    return _play(engine, gpu)


def _play(engine: Engine, gpu: VirtualGpu) -> list[WindowOutcome]:
    chance, coming, at_s = random.Random(3), list[Request](), 0.0
    for window, rate in enumerate(RATES):
        while at_s < (window + 1) * WINDOW_S:
            at_s += chance.expovariate(rate)
            sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            prompt = chance.choices(range(VOCABULARY), k=PROMPT_TOKENS)
            coming.append(Request(f"r{len(coming)}", prompt, PROMPT_TOKENS, sampling, arrival_time_s=at_s))
    waiting, times = coming[::-1], {one.request_id: list[float]() for one in coming}
    running: list[tuple[float, float, int]] = []  # when, for how long, how many
    while waiting or engine.scheduler.requests:
        while waiting and waiting[-1].arrival_time_s <= gpu.now_s:
            engine.submit(waiting.pop())
        began_s = gpu.now_s
        events = engine.step()
        if events is None:
            gpu.now_s = max(gpu.now_s, waiting[-1].arrival_time_s)
            continue
        running.append((began_s, gpu.now_s - began_s, len(engine.scheduler.running)))
        for request in events.tokens.requests:
            times[request.request_id].append(gpu.now_s)
    return [_outcome(coming, times, running, window) for window in range(len(RATES))]


def _outcome(
    made: Sequence[Request], times: dict[str, list[float]], running: Sequence[tuple[float, float, int]], window: int
) -> WindowOutcome:
    begin_s, end_s = window * WINDOW_S, (window + 1) * WINDOW_S
    mine = [times[one.request_id] for one in made if begin_s <= one.arrival_time_s < end_s]
    tpot_s = [(each[-1] - each[0]) / (len(each) - 1) for each in mine]
    inside = [(took_s, count) for at_s, took_s, count in running if begin_s <= at_s < end_s]
    num_tokens = sum(begin_s <= at_s < end_s for each in times.values() for at_s in each)
    return WindowOutcome(
        RATES[window],
        float(np.quantile(tpot_s, 0.5)),
        float(np.quantile(tpot_s, 0.95)),
        num_tokens / WINDOW_S,
        sum(took_s * count for took_s, count in inside) / WINDOW_S,
    )


def measure_goodput() -> list[Measurement]:
    """Rows for `make bench`."""
    rows = []
    for num_tokens in (*FIXED, None):
        for outcome in measure(num_tokens):
            about: dict[str, object] = {
                "draft_tokens": "adaptive" if num_tokens is None else num_tokens,
                "requests_per_s": outcome.rate,
                "tokens_per_s": round(outcome.tokens_per_s),
                "num_running": round(outcome.num_running, 1),
            }
            rows.append(Measurement("speculation.tpot_under_load", "s", [outcome.tpot_p50_s], about))
    return rows


def main() -> int:
    """Exit code."""
    argparse.ArgumentParser(
        prog="python -m bench.speculation.goodput", description=(__doc__ or "").split("\n")[0]
    ).parse_args()
    print("draft tokens  " + "".join(f"{rate:>22.0f}/s" for rate in RATES))
    for num_tokens in (*FIXED, None):
        cells = [
            f"{1000 * o.tpot_p50_s:7.1f} ms {o.tokens_per_s:6.0f} {o.num_running:5.0f}" for o in measure(num_tokens)
        ]
        print(f"{'adaptive' if num_tokens is None else num_tokens:>12}  " + "  ".join(cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
