"""Speculative decoding beside plain decoding: one engine each over the same weights, in turns, without a cluster.

    python -m bench.speculation.drafters                  # the demo model; rows are appended to bench/results/cpu.jsonl
    python -m bench.speculation.drafters --model smollm2  # prompts that ask for text that stands in them
    python -m bench.speculation.drafters --fixed          # with all drafts that are proposed, not those that pay alone

Each round has other prompts, which plain decoding gets too, so that nothing is remembered of an answer. Plain decoding
takes the first and the last turn of a round: figures are tokens a second over the mean of the two, and the second over
the first shows the machine's noise. Prompts are cut from modules that the demo model was not trained on.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.rows import ROOT, Measurement, append_rows
from training import corpus
from workers.config import EngineConfig, SpeculativeOptions, resolve_model
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.model.config import ModelConfig
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.cpu_settings import prepare_cpu
from workers.runtime.drafting.build import feature_layers, load_draft, make_speculator, measure_costs
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

DEMO_MODEL = ROOT / "models" / "demo"
DRAFTS = {"draft_model": ROOT / "models" / "demo-draft", "eagle3": ROOT / "models" / "demo-eagle3"}
PLAIN = "none"
METHODS = {"demo": ("ngram", "suffix", "draft_model", "eagle3"), "smollm2": ("ngram", "suffix")}
BATCHES = (1, 8, 32)
TEMPERATURES = (0.0, 0.7)
MODES = (False, True)  # is_invariant
ROUNDS = 5
_CPU = torch.device("cpu")
_PROMPT_TOKENS, _OUTPUT_TOKENS, _PROMPTS_PER_STREAM = 128, 96, 2
_QUOTE = "<|im_start|>user\nRepeat this code exactly as it is:\n```python\n{}\n```<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    model: str
    is_invariant: bool
    temperature: float
    batch: int


@dataclass(frozen=True, slots=True)
class Run:
    """Requests of one method, of which `batch` run at a time."""

    tokens_per_s: float
    tokens_per_step: float  # of each request
    accepted: Sequence[float]  # per position: of the drafts that reached it
    token_ids: Sequence[Sequence[int]]


class Prompts:
    """Cut from code that no model here was trained on; no two are the same."""

    def __init__(self, model: str, directory: Path) -> None:
        self._is_quoted = model == "smollm2"
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._texts = self._tokenizer.encode_batch(corpus.read().held_out, add_special_tokens=False)
        self._cuts = itertools.cycle(
            (index, start)
            for start in range(0, 1 << 14, _PROMPT_TOKENS)
            for index, text in enumerate(self._texts)
            if start + _PROMPT_TOKENS <= len(text.ids)
        )

    def take(self, count: int) -> list[list[int]]:
        """The next ones."""
        return [self._made(*next(self._cuts)) for _ in range(count)]

    def _made(self, index: int, start: int) -> list[int]:
        ids: list[int] = self._texts[index].ids[start : start + _PROMPT_TOKENS]
        if not self._is_quoted:
            return ids
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        quoted: list[int] = self._tokenizer.encode(_QUOTE.format(text), add_special_tokens=False).ids
        return quoted


class Bench:
    """One model in one mode. Engines share its weights and its cache, one after the other; but for a head's, which has
    its own. compile: as in EngineConfig."""

    def __init__(
        self, model: str, is_invariant: bool, options: SpeculativeOptions, compile: bool | None = None
    ) -> None:
        self.directory = DEMO_MODEL if model == "demo" else resolve_model(model).resolve()
        self._options = options
        self._config = EngineConfig(
            str(self.directory), device="cpu", batch_invariant=is_invariant, max_num_seqs=max(BATCHES),
            max_num_batched_tokens=512, enable_prefix_caching=False, num_blocks=max(BATCHES) * 32, max_model_len=2048,
            compile=compile,
        )  # fmt: skip
        self._model: ModelConfig = load_config(self.directory)
        self._groups = ParallelGroups(Shard(), _CPU)
        self._runner = TorchModelRunner(self._config, self._model, self._groups, _CPU)
        self._runner.warm_up()
        self._numbers = itertools.count()

    def engine(self, method: str) -> Callable[[], Engine]:
        """Makes engines with this drafter; what costs time is loaded and measured once."""
        draft_dir = str(DRAFTS.get(method, ""))
        config = replace(self._config, speculative=replace(self._options, method=method, model=draft_dir))
        draft = load_draft(config, _CPU)
        runner = self._runner
        if layers := feature_layers(config, self._groups.shard):
            runner = TorchModelRunner(config, self._model, self._groups, _CPU, feature_layers=layers)
            runner.warm_up()
        is_adaptive = method != PLAIN and self._options.enable_adaptive_verification
        costs = measure_costs(config, self._model, runner) if is_adaptive else None

        def make() -> Engine:
            executor = make_executor(config, runner, self._groups)
            speculator = make_speculator(config, runner, draft, costs)
            return make_engine(config, self._model, runner, executor, b"bench", speculation=speculator)

        return make

    def run(self, engine: Engine, prompts: Sequence[Sequence[int]], temperature: float, batch: int) -> Run:
        """Generate for all prompts, so many at a time. Steps count in which so many decode and no prompt is read: with
        drafts some requests end sooner, and a batch that shrinks would say little."""
        engine.resend_state()  # another engine ran on the same weights
        sampling = SamplingParams(temperature=temperature, max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
        found: dict[str, list[int]] = {f"r{next(self._numbers)}": [] for _ in prompts}
        coming = [
            Request(name, list(prompt), len(prompt), replace(sampling, seed=seed), arrival_time_s=seed)
            for seed, (name, prompt) in enumerate(zip(found, prompts, strict=True))
        ][::-1]
        took_s, num_tokens, num_steps = 0.0, 0, 0
        while coming or engine.scheduler.requests:
            while coming and len(engine.scheduler.requests) < batch:
                engine.submit(coming.pop())
            scheduler = engine.scheduler
            counts = len(scheduler.running) == batch and not scheduler.queues.num_queued_tokens
            began_s = time.perf_counter()
            events = engine.step()
            step_s = time.perf_counter() - began_s
            assert events is not None, "there is always something to compute"
            for token in events.tokens:
                found[token.request_id].append(token.token_id)
            if counts:
                took_s, num_tokens, num_steps = took_s + step_s, num_tokens + len(events.tokens), num_steps + 1
        counters = engine.speculation.counters if engine.speculation is not None else None
        accepted = counters.num_accepted_tokens_per_pos if counters is not None else []
        reached = counters.num_reached_tokens_per_pos if counters is not None else []
        shares = [right / judged for right, judged in zip(accepted, reached, strict=True) if judged]
        return Run(num_tokens / took_s, num_tokens / num_steps / batch, shares, list(found.values()))


def measure(
    cases: Sequence[Case], options: SpeculativeOptions, rounds: int = ROUNDS, methods: Sequence[str] = ()
) -> list[Measurement]:
    """For each case, tokens a second of each method over those of plain decoding. methods: empty means all."""
    measurements = []
    for (model, is_invariant), group in itertools.groupby(cases, lambda case: (case.model, case.is_invariant)):
        bench = Bench(model, is_invariant, options)
        makes = {method: bench.engine(method) for method in (PLAIN, *(methods or METHODS[model]))}
        prompts = Prompts(model, bench.directory)
        for case in tqdm(list(group), desc=f"{model}, {'batch-invariant' if is_invariant else 'fast'}", unit="case"):
            measurements += _compare(bench, makes, prompts, case, options, rounds)
    return measurements


def _compare(
    bench: Bench,
    makes: dict[str, Callable[[], Engine]],
    prompts: Prompts,
    case: Case,
    options: SpeculativeOptions,
    rounds: int,
) -> list[Measurement]:
    engines = {method: make() for method, make in makes.items()}
    runs: dict[str, list[Run]] = {method: [] for method in engines}
    for _ in range(rounds):
        taken = prompts.take(_PROMPTS_PER_STREAM * case.batch)
        for method in (*engines, PLAIN):
            runs[method].append(bench.run(engines[method], taken, case.temperature, case.batch))
    first, last = (runs[PLAIN][turn::2] for turn in (0, 1))
    plain_tokens_per_s = [(one.tokens_per_s + other.tokens_per_s) / 2 for one, other in zip(first, last, strict=True)]
    del runs[PLAIN]
    return [
        Measurement(
            "speculation.speedup",
            "times plain",
            [one.tokens_per_s / base for one, base in zip(found, plain_tokens_per_s, strict=True)],
            {
                "model": case.model,
                "mode": "batch-invariant" if case.is_invariant else "fast",
                "temperature": case.temperature,
                "batch": case.batch,
                "method": method,
                "adaptive": options.enable_adaptive_verification,
                "num_speculative_tokens": options.num_speculative_tokens,
                "lookup_min": options.draft_model_lookup_min,
                "tokens_per_step": round(sum(one.tokens_per_step for one in found) / rounds, 3),
                "accepted_by_position": [round(share, 3) for share in found[-1].accepted],
                "equal_tokens": sum(
                    a == b
                    for one, base in zip(found, first, strict=True)
                    for a, b in zip(one.token_ids, base.token_ids, strict=True)
                )
                / (rounds * _PROMPTS_PER_STREAM * case.batch),
                "plain_tokens_per_s": round(sum(plain_tokens_per_s) / rounds, 1),
                "plain_again": [round(b.tokens_per_s / a.tokens_per_s, 3) for a, b in zip(first, last, strict=True)],
            },
        )
        for method, found in runs.items()
    ]


def measure_speculation() -> list[Measurement]:
    """All cases of the demo model, as `make bench` runs them."""
    return measure(cases_of("demo"), SpeculativeOptions())


def cases_of(
    model: str,
    batches: Sequence[int] = BATCHES,
    temperatures: Sequence[float] = TEMPERATURES,
    modes: Sequence[bool] = MODES,
) -> list[Case]:
    """All combinations. modes: as in Case.is_invariant."""
    return [
        Case(model, is_invariant, temperature, batch)
        for is_invariant in modes
        for temperature in temperatures
        for batch in batches
    ]


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(METHODS), default="demo")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--fast", action="store_true", help="the fast mode only")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tokens", type=int, default=0, help="num_speculative_tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS["demo"], default=(), help="default: all of the model")
    parser.add_argument("--lookup", type=int, default=SpeculativeOptions().draft_model_lookup_min, help="0: none")
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--dry", action="store_true", help="append no rows")
    given = parser.parse_args()
    prepare_cpu(1)
    options = SpeculativeOptions(
        enable_adaptive_verification=not given.fixed,
        num_speculative_tokens=given.tokens,
        method=PLAIN,
        draft_model_lookup_min=given.lookup,
    )
    cases = cases_of(given.model, given.batches, given.temperatures, (False,) if given.fast else MODES)
    measurements = measure(cases, options, given.rounds, given.methods)
    for one in measurements:
        s: dict[str, Any] = one.setting
        print(
            f"{s['model']:8} {s['mode']:15} T={s['temperature']} batch {s['batch']:2} {s['method']:11}"
            f" {one.median:5.2f} times ({min(one.runs):.2f}-{max(one.runs):.2f}),"
            f" {s['tokens_per_step']} tokens a step, accepted {s['accepted_by_position'][:4]},"
            f" equal {s['equal_tokens']:.3f}, plain again {s['plain_again']}"
        )
    if not given.dry:
        append_rows(
            "cpu.jsonl", measurements, shlex.join(["python", "-m", "bench.speculation.drafters", *sys.argv[1:]])
        )


if __name__ == "__main__":
    main()
