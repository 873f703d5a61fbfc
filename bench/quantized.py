"""Speed of quantized weights beside the same model in bfloat16: one engine each, in turns, without a cluster.

The model is the 0.39 B one of the peer table, rounded to the nearest by `switchyard quantize`: speed does not depend on
what the numbers are.
"""

from __future__ import annotations

import statistics
from functools import partial

from bench.loaded_engine import CONTEXT, PROMPT, LoadedEngine, in_turns
from bench.peers.models import MODELS, default_folder, directory_of
from bench.rows import Measurement
from workers.runtime.cpu_settings import prepare_cpu

MODEL_NAMES = ("half", "half-int8", "half-int4")  # the first is what the others are compared with
_BATCHES = (1, 4, 16)
_ROUNDS = 11


def measure_quantized(num_threads: int = 2, rounds: int = _ROUNDS) -> list[Measurement]:
    """Milliseconds of each model, and how many times as fast as bfloat16 it is in the median of the rounds."""
    prepare_cpu(num_threads)
    folder = default_folder()
    engines = {
        name: LoadedEngine(directory_of(MODELS[name], folder), num_threads, max(_BATCHES)) for name in MODEL_NAMES
    }
    rows: list[Measurement] = []
    for batch_size in _BATCHES:
        took = in_turns({name: partial(each.decode_ms, batch_size) for name, each in engines.items()}, rounds)
        rows += _rows("decode", took, {"batch_size": batch_size, "context_tokens": CONTEXT, "threads": num_threads})
    took = in_turns({name: each.prefill_ms for name, each in engines.items()}, rounds)
    return rows + _rows("prefill", took, {"prompt_tokens": PROMPT, "threads": num_threads})


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
