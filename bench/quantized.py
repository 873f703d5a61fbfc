"""Speed of quantized weights beside the same model in bfloat16: one engine each, in turns, without a cluster.

The model is the 0.39 B one of the peer table, rounded to the nearest by `switchyard quantize`: speed does not depend on
what the numbers are.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import platformdirs
import torch

from bench.peers.models import MODELS, directory_of
from bench.rows import Measurement
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

MODEL_NAMES = ("half", "half-int8", "half-int4")  # the first is what the others are compared with
_BATCHES, _CONTEXT, _STEPS, _PROMPT = (1, 4, 16), 64, 16, 512
_ROUNDS = 5


class LoadedEngine:
    """One model in this process."""

    def __init__(self, directory: Path, num_threads: int) -> None:
        self._config = EngineConfig(
            str(directory),
            "bfloat16",
            "cpu",
            block_size=16,
            num_blocks=512,
            max_num_seqs=max(_BATCHES),
            max_num_batched_tokens=_PROMPT,
            enable_prefix_caching=False,
            num_threads=num_threads,
        )
        self._model = load_config(directory)
        self._groups = ParallelGroups(Shard(), torch.device("cpu"))
        self._runner = TorchModelRunner(self._config, self._model, self._groups, torch.device("cpu"))
        self._runner.warm_up()
        self._numbers = itertools.count()

    def decode_ms(self, batch_size: int) -> float:
        """Of a step, with so many sequences of about 64 tokens."""
        engine = self._engine()
        for _ in range(batch_size):
            self._submit(engine, _CONTEXT, 4 * _STEPS)
        while any(each.num_computed_tokens < each.num_given_tokens for each in engine.scheduler.requests.values()):
            engine.step()
        engine.step()
        began_s = time.perf_counter()
        for _ in range(_STEPS):
            engine.step()
        took_s = time.perf_counter() - began_s
        engine.close()
        return 1000 * took_s / _STEPS

    def prefill_ms(self) -> float:
        """Of one prompt, in one step."""
        engine = self._engine()
        self._submit(engine, _PROMPT, 1)
        began_s = time.perf_counter()
        while engine.step() is not None:
            pass
        took_s = time.perf_counter() - began_s
        engine.close()
        return 1000 * took_s

    def _engine(self) -> Engine:
        executor = make_executor(self._config, self._runner, self._groups)
        return make_engine(self._config, self._model, self._runner, executor, b"bench")

    def _submit(self, engine: Engine, num_tokens: int, max_tokens: int) -> None:
        number = next(self._numbers)
        generator = torch.Generator().manual_seed(number)
        prompt = torch.randint(self._model.vocab_size, (num_tokens,), generator=generator).tolist()
        engine.submit(Request(str(number), prompt, num_tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))


def measure_quantized(num_threads: int = 2, rounds: int = _ROUNDS) -> list[Measurement]:
    """Milliseconds of each model, and how many times as fast as bfloat16 it is in the median of the rounds."""
    torch.set_num_threads(num_threads)
    folder = platformdirs.user_cache_path("switchyard", appauthor=False) / "bench-peers"
    engines = {name: LoadedEngine(directory_of(MODELS[name], folder), num_threads) for name in MODEL_NAMES}
    rows: list[Measurement] = []
    for batch_size in _BATCHES:
        took = _in_turns({name: partial(each.decode_ms, batch_size) for name, each in engines.items()}, rounds)
        rows += _rows("decode", took, {"batch_size": batch_size, "context_tokens": _CONTEXT, "threads": num_threads})
    took = _in_turns({name: each.prefill_ms for name, each in engines.items()}, rounds)
    return rows + _rows("prefill", took, {"prompt_tokens": _PROMPT, "threads": num_threads})


def _in_turns(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """A first round warms up."""
    took: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, one in work.items():
            ms = one()
            if number:
                took[name].append(ms)
    return took


def _rows(name: str, took: dict[str, list[float]], setting: dict[str, object]) -> list[Measurement]:
    base = took[MODEL_NAMES[0]]
    rows = []
    for model, runs in took.items():
        what = {**setting, "model": model}
        rows.append(Measurement(f"quantized.{name}", "ms", runs, what))
        if model != MODEL_NAMES[0]:
            ratios = [one / other for one, other in zip(base, runs, strict=True)]
            beside = {"bfloat16": statistics.median(base)}
            rows.append(Measurement(f"quantized.{name}.ratio", "times as fast", ratios, what, beside))
    return rows
