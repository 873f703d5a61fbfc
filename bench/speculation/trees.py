"""Draft trees beside chains: tokens a step, and what they cost, along the demo model's own streams.

    python -m bench.speculation.trees              # a table; rows are appended to bench/results/cpu.jsonl
    python -m bench.speculation.trees --streams 8 --dry

The target's streams continue prompts from held-out modules. Verification is by equality, so what a step accepts follows
from the stream alone: of each position, which of the draft's candidates the stream's token is. Candidates are the K
best of the draft's log q with the noise of the target's own choice. Shapes of trees are planned on one half of the
streams and replayed on the other.

Times are processor seconds of the steps that a shape needs, on one thread, so that a busy machine does not count: of
the target, in the fast mode with all nodes in one sequence (a tree would need the mask kernel there), and in
batch-invariant mode with a sequence for each leaf; and of the draft, one step a depth. What drafts lie in the draft's
cache, and planning, are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.rows import ROOT, Measurement, append_rows
from bench.speculation.drafters import DEMO_MODEL, Bench, Prompts
from compress.calibration.walk import ModelWalk
from workers.config import EngineConfig, SpeculativeOptions
from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.step import StepPlan
from workers.model.loader import Checkpoint
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.runner import TorchModelRunner
from workers.sampling.candidates import best_candidates
from workers.sampling.params import SamplingParams, SamplingRows
from workers.speculation.trees import TreeShape, chain_shape, likeliest_shape, star_shape

TEMPERATURES = (0.0, 0.7, 1.0)
NUM_RANKS = 8  # candidates that are looked at
_CPU = torch.device("cpu")
_CONTEXT_TOKENS, _BLOCK_SIZE, _RUNS = 192, 16, 31


@dataclass(frozen=True, slots=True)
class Row:
    """One shape at one temperature."""

    name: str
    shape: TreeShape
    tokens_per_step: Sequence[float]  # of each stream
    fast: float  # times plain decoding
    invariant: float


def ranks_along(streams: Sequence[Sequence[int]], num_prompt: int, temperature: float, model: str) -> Tensor:
    """int64 [streams, completion]: which candidate of a model each token of a stream is; NUM_RANKS: none of them.

    Stream i has the seed i. All streams have one length.
    """
    found = _logits(model, torch.tensor(streams)[:, :-1])[:, num_prompt - 1 :]
    count, length, _ = found.shape
    rows = SamplingRows.greedy(count * length)
    for row in range(count * length):
        rows.put(row, SamplingParams(temperature=temperature, seed=row // length))
    positions = np.tile(np.arange(length), count)
    candidates = best_candidates(found.flatten(0, 1), rows, positions, NUM_RANKS)
    chosen = torch.tensor(streams)[:, num_prompt:].flatten()
    is_it = candidates == chosen[:, None]
    return torch.where(is_it.any(1), is_it.int().argmax(1), NUM_RANKS).view(count, length)


def _logits(model: str, token_ids: Tensor) -> Tensor:
    """fp32 [streams, tokens, vocab]: of the whole model, as the engine computes it."""
    config = load_config(model)
    walk = ModelWalk(config, Checkpoint(Path(model), torch.float32, _CPU), _CPU)
    with torch.inference_mode():
        x = walk.enter(token_ids)
        for index in range(config.num_hidden_layers):
            x = walk.through(walk.plain_layer(index), index, x)
        return walk.logits(x)


def replayed(shape: TreeShape, ranks: Sequence[int]) -> float:
    """Tokens a step over a stream. Its last step may not have room for all that it could accept, and is left out."""
    at, steps = 0, 0
    while at + shape.depth < len(ranks):
        at += 1 + shape.num_accepted(ranks[at : at + shape.depth])
        steps += 1
    return at / steps


def shapes_of(rank_shares: Sequence[float]) -> dict[str, TreeShape]:
    """Those that are compared, by name."""
    return {
        **{f"chain {k}": chain_shape(k) for k in (1, 2, 3, 4, 8)},
        **{f"{k} best": star_shape(k) for k in (2, 4)},
        **{f"tree {n}, depth 2": likeliest_shape(rank_shares, n, max_depth=2) for n in (4, 8)},
        **{f"tree {n}": likeliest_shape(rank_shares, n) for n in (4, 8)},
    }


class Clock:
    """Processor seconds of one model's steps."""

    def __init__(self, model: str, is_invariant: bool = False) -> None:
        config = EngineConfig(
            model, device="cpu", batch_invariant=is_invariant, max_num_seqs=16, max_num_batched_tokens=256,
            num_blocks=64, max_model_len=1024, block_size=_BLOCK_SIZE, num_threads=1,
        )  # fmt: skip
        loaded = load_config(model)
        self._runner = TorchModelRunner(config, loaded, ParallelGroups(Shard(), _CPU), _CPU)
        self._num_groups = len(self._runner.cache.layout.groups)
        self._measured_s: dict[tuple[int, ...], float] = {}

    def measure(self, steps: Sequence[tuple[int, ...]]) -> None:
        """Steps of sequences with so many tokens each, all of which are judged; in turns, so that they compare."""
        took_s: dict[tuple[int, ...], list[float]] = {widths: [] for widths in steps}
        plans = {widths: self._plan(widths) for widths in took_s}
        for _ in range(_RUNS):
            for widths, plan in plans.items():
                began_s = time.process_time()
                self._runner.execute(plan)
                took_s[widths].append(time.process_time() - began_s)
        self._measured_s = {widths: statistics.median(found) for widths, found in took_s.items()}

    def _plan(self, widths: Sequence[int]) -> StepPlan:
        chunks = []
        for width in widths:
            end = _CONTEXT_TOKENS + width
            blocks = [[0] * -(-end // _BLOCK_SIZE) for _ in range(self._num_groups)]
            chunks.append(DirectChunk([0] * width, _CONTEXT_TOKENS, end, blocks, width))
        return direct_plan(chunks)

    def step_s(self, widths: tuple[int, ...]) -> float:
        """Of a step that was measured."""
        return self._measured_s[widths]


@dataclass(frozen=True, slots=True)
class Clocks:
    """Of the draft, and of the target in its two modes."""

    draft: Clock
    fast: Clock
    invariant: Clock

    def measure(self, shapes: Collection[TreeShape]) -> None:
        """All steps that these shapes need, and plain ones."""
        self.draft.measure([(1,) * width for width in sorted({1, *(w for shape in shapes for w in shape.widths)})])
        self.fast.measure([(1 + num_drafts,) for num_drafts in sorted({0, *(shape.num_drafts for shape in shapes)})])
        self.invariant.measure(sorted({(1,), *(shape.branch_lengths for shape in shapes)}))

    def __str__(self) -> str:
        named = {"draft": self.draft, "fast": self.fast, "invariant": self.invariant}
        return ", ".join(f"{name} {1000 * clock.step_s((1,)):.2f} ms" for name, clock in named.items())

    def speedup(self, shape: TreeShape, tokens_per_step: float) -> tuple[float, float]:
        """(fast, batch-invariant) times plain decoding."""
        draft_s = sum(self.draft.step_s((1,) * width) for width in shape.widths)
        fast_s = self.fast.step_s((1 + shape.num_drafts,)) + draft_s
        invariant_s = self.invariant.step_s(shape.branch_lengths) + draft_s
        return (
            tokens_per_step * self.fast.step_s((1,)) / fast_s,
            tokens_per_step * self.invariant.step_s((1,)) / invariant_s,
        )


def compare(
    bench: Bench, draft: str, prompts: Sequence[Sequence[int]], temperature: float, clocks: Clocks
) -> list[Row]:
    """All shapes at one temperature."""
    run = bench.run(bench.engine("none")(), prompts, temperature, len(prompts))
    streams = [[*prompt, *ids] for prompt, ids in zip(prompts, run.token_ids, strict=True)]
    own = ranks_along(streams, len(prompts[0]), temperature, str(DEMO_MODEL))
    ranks = ranks_along(streams, len(prompts[0]), temperature, draft)
    planned, judged = ranks[::2], ranks[1::2].tolist()
    shares = [float((planned == rank).double().mean()) for rank in range(NUM_RANKS)]
    shown = ", ".join(f"{float((ranks == rank).double().mean()):.3f}" for rank in range(NUM_RANKS))
    print(f"\nT={temperature}: of {ranks.numel()} tokens, {float((own == 0).double().mean()):.4f} are what the target")
    print(f"chooses by its own logits again; the share of each rank of the draft's candidates is {shown}")
    shapes = shapes_of(shares)
    clocks.measure(shapes.values())
    print(f"a step of one token takes: {clocks}")
    rows = []
    for name, shape in shapes.items():
        found = [replayed(shape, stream) for stream in judged]
        rows.append(Row(name, shape, found, *clocks.speedup(shape, statistics.mean(found))))
    return rows


def show(rows: Sequence[Row]) -> None:
    """As a table."""
    print("| drafts | verified | in branches | draft steps | tokens a step | fast, times plain | invariant |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        mean, error = statistics.mean(row.tokens_per_step), statistics.stdev(row.tokens_per_step)
        error /= len(row.tokens_per_step) ** 0.5
        shape = row.shape
        print(
            f"| {row.name} | {1 + shape.num_drafts} | {sum(shape.branch_lengths)} | {shape.depth}"
            f" | {mean:.2f} ± {error:.2f} | {row.fast:.2f} | {row.invariant:.2f} |"
        )


def measurements(rows: Sequence[Row], temperature: float) -> list[Measurement]:
    """As rows of results."""
    return [
        Measurement(
            "draft_trees.tokens_per_step",
            "tokens",
            [round(value, 4) for value in row.tokens_per_step],
            _setting(row, temperature),
        )
        for row in rows
    ]


def _setting(row: Row, temperature: float) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "drafts": row.name,
        "parents": row.shape.parents,
        "ranks": row.shape.ranks,
        "fast_times_plain": round(row.fast, 3),
        "invariant_times_plain": round(row.invariant, 3),
    }


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="at each temperature; at most 32")
    parser.add_argument("--draft", default=str(ROOT / "models" / "demo-draft"), help="directory of the draft model")
    parser.add_argument("--dry", action="store_true", help="append no rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench("demo", False, replace(SpeculativeOptions(), enable_adaptive_verification=False))
    prompts = Prompts("demo", bench.directory).take(given.streams)
    clocks = Clocks(Clock(given.draft), Clock(str(DEMO_MODEL)), Clock(str(DEMO_MODEL), is_invariant=True))
    found = []
    for temperature in TEMPERATURES:
        rows = compare(bench, given.draft, prompts, temperature, clocks)
        show(rows)
        found += measurements(rows, temperature)
    if not given.dry:
        append_rows("cpu.jsonl", found, "python -m bench.speculation.trees")


if __name__ == "__main__":
    main()
