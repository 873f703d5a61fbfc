"""An engine without a cluster whose steps are timed, and measurements that take turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

CONTEXT, PROMPT = 64, 512  # tokens
_STEPS = 16


class LoadedEngine:
    """One model in this process."""

    def __init__(self, directory: Path, num_threads: int, max_num_seqs: int) -> None:
        self._config = EngineConfig(
            str(directory),
            "bfloat16",
            "cpu",
            block_size=16,
            num_blocks=512,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=PROMPT,
            enable_prefix_caching=False,
            num_threads=num_threads,
        )
        self._model = load_config(directory)
        self._groups = ParallelGroups(Shard(), torch.device("cpu"))
        self.runner = TorchModelRunner(self._config, self._model, self._groups, torch.device("cpu"))
        self.runner.warm_up()
        self._numbers = itertools.count()

    def decode_ms(self, batch_size: int) -> float:
        """Of a step, with so many sequences of about 64 tokens."""
        engine = self._engine()
        for _ in range(batch_size):
            self._submit(engine, CONTEXT, 4 * _STEPS)
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
        self._submit(engine, PROMPT, 1)
        began_s = time.perf_counter()
        while engine.step() is not None:
            pass
        took_s = time.perf_counter() - began_s
        engine.close()
        return 1000 * took_s

    def _engine(self) -> Engine:
        executor = make_executor(self._config, self.runner, self._groups)
        return make_engine(self._config, self._model, self.runner, executor, b"bench")

    def _submit(self, engine: Engine, num_tokens: int, max_tokens: int) -> None:
        number = next(self._numbers)
        generator = torch.Generator().manual_seed(number)
        prompt = torch.randint(self._model.vocab_size, (num_tokens,), generator=generator).tolist()
        engine.submit(Request(str(number), prompt, num_tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))


def in_turns(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """A first round warms up."""
    took: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, one in work.items():
            ms = one()
            if number:
                took[name].append(ms)
    return took
