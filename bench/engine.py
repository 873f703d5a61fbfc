"""Runs an engine of a named shape on random weights, without Ray, and prints its rates beside the roofline.

    python -m bench.engine --shape llama-3.1-8b --out DIR   # on a CUDA device; a row per measurement in engine.jsonl
    python -m bench.engine --shape tiny                     # anywhere: a rehearsal

Decode is timed over steps of a full batch at a fixed context, prefill over one step that computes a whole prompt, both
as the engine is by default and in batch-invariant mode. The roofline is what the weights and the KV cost at the copy
and GEMM rates that are measured first. Each mode's greedy tokens with graphs are compared with those without; they must
be equal in batch-invariant mode, while otherwise a padded product may round differently.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from costs.model import DecoderSizes, model_step
from kernels.harness.timing import Ceilings, measure_ceilings
from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.decoder import LayerConfig, PreNormDecoder
from workers.model.parts import AttentionConfig, ExpertsConfig, MlpConfig, RopeConfig
from workers.model.quant.plain import PLAIN_FORMAT
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_executor
from workers.runtime.cpu_settings import prepare_cpu
from workers.runtime.runner import TorchModelRunner, pick_device, pick_dtype, schedules_async
from workers.sampling.params import SamplingParams

_DECODE_STEPS = 32
_RUNS = 3
_COMPARED_PROMPTS, _COMPARED_TOKENS = (1, 7, 33, 60), 24


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model whose layers are all equal; with experts, the MLP is theirs alone."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    head_dim: int = 0  # 0: hidden / heads
    experts: ExpertsConfig | None = None

    def decoder_sizes(self) -> DecoderSizes:
        """For the roofline."""
        experts = self.experts or ExpertsConfig(0, 0, 0)
        return DecoderSizes(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim or self.hidden // self.heads,
            vocab_size=self.vocab,
            num_experts=experts.num_experts,
            num_experts_per_tok=experts.num_experts_per_tok,
            moe_intermediate_size=experts.moe_intermediate_size,
        )

    def model(self) -> ModelConfig:
        """A Llama; with experts a Qwen 3."""
        attention = AttentionConfig(
            self.heads,
            self.kv_heads,
            self.head_dim or self.hidden // self.heads,
            RopeConfig(1000000.0 if self.experts else 500000.0),
            has_qk_norm=self.experts is not None,
        )
        layer = LayerConfig(attention, self.experts or MlpConfig(self.inner))
        return ModelConfig(
            architecture="Qwen3MoeForCausalLM" if self.experts else "LlamaForCausalLM",
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            vocab_size=self.vocab,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-6 if self.experts else 1e-5,
            tie_word_embeddings=False,
            eos_token_ids=(),
            decoder=PreNormDecoder((layer,) * self.layers),
            weight_format=PLAIN_FORMAT,
        )


SHAPES = {
    "tiny": Sizes(256, 512, 4, 4, 2, 4096, 2048),
    "tiny-experts": Sizes(256, 512, 2, 4, 2, 4096, 2048, 64, ExpertsConfig(8, 2, 128, True)),
    "llama-3.2-1b": Sizes(2048, 8192, 16, 32, 8, 128256, 16384),
    "llama-3.1-8b": Sizes(4096, 14336, 32, 32, 8, 128256, 16384),
    "qwen3-30b-a3b": Sizes(2048, 6144, 48, 32, 4, 151936, 16384, 128, ExpertsConfig(128, 8, 768, True)),
}


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Normal numbers in place of a checkpoint, drawn on the device; norms are ones."""

    dtype: torch.dtype
    device: torch.device

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), as_stored: bool = False) -> Tensor:
        """As in Weights."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        cut = [len(range(size)[which]) for size, which in zip(shape, part, strict=False)]
        return torch.empty(*cut, *shape[len(cut) :], dtype=self.dtype, device=self.device).normal_(std=0.02)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """As in Weights: whatever is asked for is there, and what may be missing is."""
        return None


class Bench:
    """One loaded engine beside the ceilings of its device."""

    def __init__(self, sizes: Sizes, config: EngineConfig, ceilings: Ceilings) -> None:
        self.device = pick_device(config, 0)
        self.dtype = pick_dtype(config, self.device)
        self.ceilings = ceilings
        self._config = config
        self._model = sizes.model()
        self._sizes = sizes.decoder_sizes()
        self._groups = ParallelGroups(Shard(), self.device)
        weights = RandomWeights(self.dtype, self.device)
        self._runner = TorchModelRunner(config, self._model, self._groups, self.device, weights)
        self._runner.warm_up()

    def same_tokens(self) -> bool | None:
        """Whether greedy tokens with graphs are those without; None without graphs."""
        if not self._config.cuda_graphs:
            return None
        completions = []
        for self._runner.replays in (False, True):
            completions.append(self._complete())
        return completions[0] == completions[1]

    def _complete(self) -> list[list[int]]:
        engine = self._engine(len(_COMPARED_PROMPTS))
        for i, num_tokens in enumerate(_COMPARED_PROMPTS):
            self._submit(engine, i, num_tokens, _COMPARED_TOKENS)
        completions: list[list[int]] = [[] for _ in _COMPARED_PROMPTS]
        while (events := engine.step()) is not None:
            for token in events.tokens:
                completions[int(token.request_id)].append(token.token_id)
        engine.close()
        return completions

    def decode(self, batch_size: int, context: int) -> dict[str, object]:
        """Tokens per second of a batch whose sequences have about so many tokens."""
        runs = [self._decode_once(batch_size, context) for _ in range(_RUNS)]
        mean_length = context + _DECODE_STEPS // 2
        return self._row("decode", batch_size, context, batch_size, [1] * batch_size, [mean_length] * batch_size, runs)

    def prefill(self, num_tokens: int) -> dict[str, object]:
        """Tokens per second of one prompt, computed in one step."""
        runs = [self._prefill_once(num_tokens) for _ in range(_RUNS)]
        return self._row("prefill", 1, num_tokens, num_tokens, [num_tokens], [num_tokens], runs)

    def _row(
        self,
        name: str,
        batch_size: int,
        context: int,
        num_tokens: int,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        runs_s: Sequence[float],
    ) -> dict[str, object]:
        step_s = statistics.median(runs_s)
        cost = model_step(self._sizes, query_lens, seq_lens, batch_size, self.dtype.itemsize)
        return {
            "name": name,
            "batch_invariant": self._config.batch_invariant,
            "graphs": bool(self._config.cuda_graphs),
            "async_scheduling": schedules_async(self._config, self.device),
            "batch_size": batch_size,
            "context_tokens": context,
            "step_ms": step_s * 1000,
            "runs_ms": [run * 1000 for run in runs_s],
            "tokens_per_s": num_tokens / step_s,
            "share_of_roofline": self.ceilings.floor_s(cost.memory_bytes, cost.flops) / step_s,
            "ceilings": asdict(self.ceilings),
        }

    def _engine(self, max_num_seqs: int) -> Engine:
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs, self._config.max_num_batched_tokens, self._model.max_position_embeddings),
            BlockPools([BlockPool(self._runner.cache.num_blocks[0], self._config.block_size, False)]),
            b"bench",
            frozenset(),
        )
        is_async = schedules_async(self._config, self.device)
        executor = make_executor(self._config, self._runner, self._groups)
        return Engine(scheduler, executor, self._model.vocab_size, time.monotonic, is_async)

    def _submit(self, engine: Engine, number: int, num_tokens: int, max_tokens: int) -> None:
        generator = torch.Generator().manual_seed(number)
        prompt = torch.randint(self._model.vocab_size, (num_tokens,), generator=generator).tolist()
        engine.submit(Request(str(number), prompt, num_tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))

    def _decode_once(self, batch_size: int, context: int) -> float:
        engine = self._engine(batch_size)
        for i in range(batch_size):
            self._submit(engine, i, context, _DECODE_STEPS + 2 + batch_size * context)
        # Until every prompt is computed; what decodes meanwhile has a few tokens more than the others.
        while any(r.num_computed_tokens < r.num_given_tokens for r in engine.scheduler.requests.values()):
            engine.step()
        engine.step()

        def steps() -> None:
            for _ in range(_DECODE_STEPS):
                engine.step()

        step_s = self._timed(steps) / _DECODE_STEPS
        engine.close()
        return step_s

    def _prefill_once(self, num_tokens: int) -> float:
        engine = self._engine(1)
        self._submit(engine, 0, num_tokens, 1)

        def whole() -> None:
            while engine.step() is not None:
                pass

        prefill_s = self._timed(whole)
        engine.close()
        return prefill_s

    def _timed(self, work: Callable[[], None]) -> float:
        self._wait()
        began_s = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began_s

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    sizes: Sizes,
    config: EngineConfig,
    ceilings: Ceilings,
    batch_sizes: Sequence[int],
    context: int,
    prompt: int,
) -> list[dict[str, object]]:
    """A row per batch size and one for prefill, of one engine."""
    bench = Bench(sizes, config, ceilings)
    same = bench.same_tokens()
    rows = [bench.decode(batch_size, context) for batch_size in batch_sizes]
    rows.append(bench.prefill(prompt))
    return [{"dtype": str(bench.dtype), "same_tokens": same, **row} for row in rows]


def describe(row: dict[str, object]) -> str:
    """A row as a line."""
    modes = [name.replace("_", " ") for name in ("graphs", "async_scheduling", "batch_invariant") if row[name]]
    same = {True: "; same tokens as without graphs", False: "; NOT the tokens without graphs", None: ""}
    return (
        f"{row['name']:8} batch {row['batch_size']:3} at {row['context_tokens']:6} tokens:"
        f" {row['step_ms']:9.2f} ms, {row['tokens_per_s']:10.1f} tokens/s,"
        f" {row['share_of_roofline']:.0%} of the roofline"
        f" ({', '.join(modes) or 'plain'}{same[cast(bool | None, row['same_tokens'])]})"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch-sizes", type=_positive, nargs="+", default=[1, 64], help="of decode steps")
    parser.add_argument("--context", type=_positive, default=1024, help="tokens of each sequence before decode steps")
    parser.add_argument("--prompt", type=_positive, default=8192, help="tokens of the prefill that is timed")
    parser.add_argument("--threads", type=_positive, default=2, help="of a CPU")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="a CPU's layers; default: by their size"
    )
    parser.add_argument(
        "--async-scheduling", action=argparse.BooleanOptionalAction, default=None, help="default: on CUDA"
    )
    parser.add_argument(
        "--modes", choices=("plain", "batch-invariant"), nargs="+", help="both, where the shape has no experts"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder; rows are appended to engine.jsonl there")
    options = parser.parse_args()
    prepare_cpu(options.threads)
    sizes = SHAPES[options.shape]
    try:
        device = pick_device(EngineConfig("", device=options.device), 0)
    except ModelError as error:
        parser.error(str(error))
    largest, prompt = max(options.batch_sizes), min(options.prompt, sizes.context - 1)
    # A sequence decodes while the others of its batch begin, then for the steps that are timed.
    if options.context + largest + _DECODE_STEPS >= sizes.context:
        parser.error(f"--context: {options.context} and the steps do not fit {sizes.context} positions")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is not a folder")
    block_size = 64 if device.type == "cuda" else 16
    blocks = max(largest * -(-(options.context + _DECODE_STEPS + largest) // block_size), -(-prompt // block_size)) + 64
    plain = EngineConfig(
        "",
        device=options.device,
        block_size=block_size,
        num_blocks=blocks,
        max_num_seqs=max(largest, len(_COMPARED_PROMPTS)),
        max_num_batched_tokens=max(prompt, largest),
        cuda_graphs=options.graphs,
        compile=options.compile,
        async_scheduling=options.async_scheduling,
    )
    ceilings = measure_ceilings(device.type)
    print(f"{options.shape}, {ceilings.device}", flush=True)
    modes = options.modes or ["plain", *(() if sizes.experts else ("batch-invariant",))]
    has_failed = False
    for mode in modes:
        config = replace(plain, batch_invariant=mode == "batch-invariant")
        with torch.inference_mode():
            rows = measure(sizes, config, ceilings, options.batch_sizes, options.context, prompt)
        gc.collect()  # frees the memory for the next engine
        for row in rows:
            print(describe(row), flush=True)
            # In the other mode a padded product may round differently, and a close race end differently.
            has_failed |= mode == "batch-invariant" and row["same_tokens"] is False
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            with (options.out / "engine.jsonl").open("a", encoding="utf-8") as out:
                out.writelines(json.dumps({"shape": options.shape, **row}) + "\n" for row in rows)
    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()
