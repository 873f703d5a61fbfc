"""A hundred LoRA adapters on one worker of which sixteen are on its device at a time.

    python -m bench.adapters.one_worker

Requests choose their adapter by Zipf's law, as popularity among tenants is skewed. In turns with it runs the same load
without adapters on an engine that takes none, on one that takes them, and with one adapter for all. What is measured is
how often a request finds its adapter on the device, and what a token costs more than with the base alone. The adapters
have random numbers: speed does not depend on what they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bench.rows import ROOT, Measurement, append_rows
from checkpoint.adapters.directory import adapter_digest
from workers.config import EngineConfig
from workers.engine.adapters.ref import AdapterRef
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.cpu_settings import prepare_cpu
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

NUM_ADAPTERS, RANK, NUM_SLOTS = 100, 8, 16
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 32
ZIPF = 1.0  # the n-th most popular adapter has 1 / n of the requests of the first
_KINDS = ("none taken", "none used", "one for all", "zipf")
"""An engine that takes no adapters; one that takes them, for requests without; the same for requests with."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one run asks for."""

    num_requests: int
    num_streams: int  # at a time
    adapters: Sequence[AdapterRef | None]  # of each request


@dataclass(frozen=True, slots=True)
class RunResult:
    """Of one run."""

    ms_per_token: float  # wall time over tokens of all streams
    cpu_ms_per_token: float  # processor time of the process, its threads included: other work does not count in it
    num_hits: int
    num_copies: int
    num_reads: int


def write_adapters(model_dir: Path, folder: Path, count: int, rank: int) -> list[AdapterRef]:
    """Adapters of all seven matrices of each layer, in PEFT's layout."""
    config = json.loads((model_dir / "config.json").read_text())
    hidden, width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in attention.items()}
    shapes |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    refs = []
    for number in range(count):
        directory, generator = folder / f"adapter-{number}", torch.Generator().manual_seed(number)
        directory.mkdir()
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (outputs, inputs) in shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.02
        save_file(tensors, directory / "adapter_model.safetensors")
        targets = sorted({name.split(".")[1] for name in shapes})
        content = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": targets,
        }
        (directory / "adapter_config.json").write_text(json.dumps(content))
        refs.append(AdapterRef(directory.name, adapter_digest(directory), str(directory)))
    return refs


class AdapterEngines:
    """Engines over one model in this process: with adapters and without."""

    def __init__(self, model_dir: Path, num_streams: int, num_threads: int) -> None:
        self._groups = ParallelGroups(Shard(), torch.device("cpu"))
        self._model = load_config(model_dir)
        self._runners: dict[bool, tuple[EngineConfig, TorchModelRunner]] = {}
        for takes_adapters in (False, True):
            config = EngineConfig(
                str(model_dir), "float32", "cpu", block_size=16, num_blocks=1024, max_num_seqs=num_streams,
                max_num_batched_tokens=256, enable_prefix_caching=False, num_threads=num_threads,
                enable_lora=takes_adapters, max_loras=NUM_SLOTS, max_lora_rank=RANK,
            )  # fmt: skip
            runner = TorchModelRunner(config, self._model, self._groups, torch.device("cpu"))
            runner.warm_up()
            self._runners[takes_adapters] = config, runner

    def run(self, load: Load, takes_adapters: bool, seed: int) -> RunResult:
        """One load from the first request to the last token; streams that end are replaced at once."""
        config, runner = self._runners[takes_adapters]
        engine = make_engine(config, self._model, runner, make_executor(config, runner, self._groups), b"bench")
        coming = iter(self._requests(load, seed))
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(load.num_streams):
            self._submit_next(engine, coming)
        num_ended = 0
        while num_ended < load.num_requests:
            events = engine.step()
            if events is None:
                time.sleep(0.0002)  # an adapter is being read
                continue
            for _ in events.ended:
                num_ended += 1
                self._submit_next(engine, coming)
        took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        book, num_tokens = engine.scheduler.adapters, engine.counters.num_generated_tokens
        assert num_tokens == load.num_requests * OUTPUT_TOKENS
        engine.close()
        ms = 1000 * took_s / num_tokens, 1000 * took_cpu_s / num_tokens
        return RunResult(*ms, book.num_hits, book.num_copies, book.num_reads)

    def _requests(self, load: Load, seed: int) -> Sequence[Request]:
        prompts = np.random.default_rng(seed).integers(self._model.vocab_size, size=(load.num_requests, PROMPT_TOKENS))
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        return [
            Request(f"r{i}", prompt, PROMPT_TOKENS, sampling, adapter=adapter, arrival_time_s=float(i))
            for i, (prompt, adapter) in enumerate(zip(prompts.tolist(), load.adapters, strict=True))
        ]

    @staticmethod
    def _submit_next(engine: Engine, coming: Iterator[Request]) -> None:
        request = next(coming, None)
        if request is not None:
            engine.submit(request)


def popularity(count: int, num_requests: int, seed: int) -> list[int]:
    """Of each request the number of its adapter."""
    weights = 1.0 / np.arange(1, count + 1) ** ZIPF
    chosen: list[int] = np.random.default_rng(seed).choice(count, num_requests, p=weights / weights.sum()).tolist()
    return chosen


def measure_adapters(
    num_streams: int = 16, num_requests: int = 300, rounds: int = 3, num_threads: int = 1
) -> list[Measurement]:
    """Hit rate, and milliseconds of a token of each kind of load, in turns."""
    prepare_cpu(num_threads)
    model_dir = ROOT / "models" / "demo"
    runs: dict[str, list[RunResult]] = {kind: [] for kind in _KINDS}
    with tempfile.TemporaryDirectory() as folder:
        refs = write_adapters(model_dir, Path(folder), NUM_ADAPTERS, RANK)
        engines = AdapterEngines(model_dir, num_streams, num_threads)
        for number in range(rounds + 1):
            chosen = popularity(NUM_ADAPTERS, num_requests, number)
            wanted: dict[str, list[AdapterRef | None]] = {
                "none taken": [None] * num_requests,
                "none used": [None] * num_requests,
                "one for all": [refs[0]] * num_requests,
                "zipf": [refs[i] for i in chosen],
            }
            for kind in _KINDS:
                result = engines.run(Load(num_requests, num_streams, wanted[kind]), kind != "none taken", number)
                if number:  # the first round warms up
                    runs[kind].append(result)
    return _rows(runs, {"streams": num_streams, "requests": num_requests, "threads": num_threads})


def _rows(runs: dict[str, list[RunResult]], setting: dict[str, object]) -> list[Measurement]:
    setting = {**setting, "adapters": NUM_ADAPTERS, "rank": RANK, "slots": NUM_SLOTS, "zipf": ZIPF, "model": "demo"}
    rows = []
    for name, field in (("adapters.token", "ms_per_token"), ("adapters.token.processor", "cpu_ms_per_token")):
        base = statistics.median(getattr(run, field) for run in runs["none taken"])
        for kind, results in runs.items():
            took = [getattr(run, field) for run in results]
            rows.append(Measurement(name, "ms", took, {**setting, "load": kind}, {"none taken": base}))
    for name in ("num_hits", "num_copies", "num_reads"):
        shares = [getattr(run, name) / int(str(setting["requests"])) for run in runs["zipf"]]
        rows.append(Measurement(f"adapters.{name[4:]}", "per request", shares, {**setting, "load": "zipf"}))
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    options = parser.parse_args()
    rows = []
    for num_streams in options.streams:
        rows += measure_adapters(num_streams, options.requests, options.rounds, options.threads)
    for row in rows:
        print(
            f"{row.name:24} {row.setting['streams']:3} streams  {row.setting['load']!s:12} {row.median:8.3f} {row.unit}"
        )
    append_rows("cpu.jsonl", rows, "python -m bench.adapters.one_worker")


if __name__ == "__main__":
    main()
