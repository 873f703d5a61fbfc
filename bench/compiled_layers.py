"""Steps with compiled layers beside the same engine's steps without: in turns, without a cluster."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from bench.loaded_engine import CONTEXT, PROMPT, LoadedEngine, in_turns
from bench.peers.models import MODELS, default_folder, directory_of
from bench.rows import Measurement
from workers.runtime.cpu_settings import prepare_cpu

MODEL_NAMES = ("tiny", "half", "half-int8")
_BATCHES = (1, 4, 16)
_ROUNDS = 7


def measure_compiled_layers(
    num_threads: int = 2, rounds: int = _ROUNDS, model_names: tuple[str, ...] = MODEL_NAMES
) -> list[Measurement]:
    """Milliseconds of both ways, and how many times as fast the compiled one is in the median of the rounds."""
    prepare_cpu(num_threads)
    folder = default_folder()
    rows: list[Measurement] = []
    for name in model_names:
        engine = LoadedEngine(directory_of(MODELS[name], folder), num_threads, max(_BATCHES))
        if not engine.runner.is_compiled:
            raise SystemExit(f"switchyard bench: the layers of {name} were not compiled; the log says why")
        for batch_size in _BATCHES:
            setting = {"model": name, "batch_size": batch_size, "context_tokens": CONTEXT, "threads": num_threads}
            rows += _both_ways("decode", engine, partial(engine.decode_ms, batch_size), rounds, setting)
        setting = {"model": name, "prompt_tokens": PROMPT, "threads": num_threads}
        rows += _both_ways("prefill", engine, engine.prefill_ms, rounds, setting)
    return rows


def _both_ways(
    name: str, engine: LoadedEngine, measure: Callable[[], float], rounds: int, setting: dict[str, object]
) -> list[Measurement]:
    def one(is_compiled: bool) -> float:
        engine.runner.replays = is_compiled
        return measure()

    took = in_turns({"compiled": partial(one, True), "eager": partial(one, False)}, rounds)
    ratios = [eager / compiled for eager, compiled in zip(took["eager"], took["compiled"], strict=True)]
    beside = {"eager": statistics.median(took["eager"])}
    return [
        Measurement(f"compiled_layers.{name}", "ms", took["compiled"], setting, beside),
        Measurement(f"compiled_layers.{name}.ratio", "times as fast", ratios, setting),
    ]
