"""What the ways to keep keys and values cost and save: loss of held-out text, bytes per token, and streams that fit.

    make bench ARGS="kv_schemes --kv-model models/demo"      # rows in bench/results/cpu.jsonl, and a table
    python -m bench.kv.schemes --kv-model DIR                 # the table alone

The loss is the engine's own: the text is served as prompts that ask for the logprobs of their tokens, in chunks, so
that most of it is attended to through the cache. Bytes are those of a cache beside bfloat16 activations, whatever the
loss is computed in. Knows nothing of routers and clusters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bench.rows import Measurement
from kvstore.config import KV_CACHE_DTYPES
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.request import Request
from workers.kv.paged_cache import CacheLayout
from workers.kv.schemes.named import scheme_of
from workers.model.config import ModelConfig
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

DEMO = "models/demo"
CPU = torch.device("cpu")
_CHUNK_TOKENS = 64
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SchemeOptions:
    """What is measured, and on what."""

    model_dir: str
    text: Path
    schemes: Sequence[str]
    dtype: str = "float32"
    num_segments: int = 2
    segment_tokens: int = 512
    context_tokens: int = 2048
    """Of a stream, when bytes and streams are counted."""
    block_size: int = 32


@dataclass(frozen=True, slots=True)
class SchemeFigures:
    """One scheme."""

    scheme: str
    losses: Sequence[float]
    """Nats per token of each segment of the text, its first token aside."""
    bytes_per_token: float
    num_streams: int
    """That fit into a GiB of cache."""

    @property
    def loss(self) -> float:
        """Of all segments, which are equally long."""
        return statistics.fmean(self.losses)


def scheme_config(scheme: str, options: SchemeOptions) -> EngineConfig:
    """An engine that keeps keys and values in this scheme: a name, or NAME/WINDOW/SINKS. Raises ValueError."""
    name, *tokens = scheme.split("/")
    if len(tokens) not in (0, 2):
        raise ValueError("must be NAME or NAME/WINDOW/SINKS, as kivi2/32/0")
    num_tokens = options.segment_tokens + 1
    config = EngineConfig(
        options.model_dir,
        options.dtype,
        "cpu",
        block_size=options.block_size,
        max_num_seqs=1,
        max_num_batched_tokens=_CHUNK_TOKENS,
        enable_prefix_caching=False,
        kv_cache_dtype=name,
    )
    if tokens:
        config = replace(config, kv_window_tokens=int(tokens[0]), kv_sink_tokens=int(tokens[1]))
    return replace(config, num_blocks=-(-num_tokens // config.block_size) + 8)


def measure(scheme: str, options: SchemeOptions, segments: Sequence[Sequence[int]]) -> SchemeFigures:
    """Serve the segments from a cache of this scheme."""
    config, model = scheme_config(scheme, options), load_config(options.model_dir)
    groups = ParallelGroups(Shard(), CPU)
    runner = TorchModelRunner(config, model, groups, CPU)
    engine = make_engine(config, model, runner, make_executor(config, runner, groups), b"", clock=lambda: 0.0)
    losses = [_loss(engine, f"s{i}", token_ids) for i, token_ids in enumerate(segments)]
    engine.close()
    stream_bytes = bytes_of_stream(config, model, options.context_tokens)
    return SchemeFigures(scheme, losses, stream_bytes / options.context_tokens, _CACHE_BYTES // stream_bytes)


def _loss(engine: Engine, name: str, token_ids: Sequence[int]) -> float:
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    engine.submit(Request(name, list(token_ids), len(token_ids), sampling))
    found: list[float] = []
    while engine.scheduler.has_work():
        events = engine.step()
        if events is not None:
            found += [-one.logprob for part in events.prompt_logprobs for one in part.logprobs]
    assert len(found) == len(token_ids) - 1, f"{len(found)} logprobs of {len(token_ids)} tokens"
    return statistics.fmean(found)


def bytes_of_stream(config: EngineConfig, model: ModelConfig, context_tokens: int) -> int:
    """What a stream with so many tokens holds beside bfloat16 activations, all ranks together."""
    scheme = scheme_of(config)
    layers = range(model.num_hidden_layers)
    layout = CacheLayout(scheme.groups(model.cache_specs), layers, Shard(), config.block_size, torch.bfloat16, scheme)
    return sum(
        layout.block_bytes(group) * group.num_blocks_held(context_tokens, config.block_size) for group in layout.groups
    )


def segments_of(options: SchemeOptions) -> list[list[int]]:
    """The beginning of the text in equal parts. Raises ValueError when it is too short."""
    tokenizer = Tokenizer.from_file(f"{options.model_dir}/tokenizer.json")
    ids, size = tokenizer.encode(options.text.read_text(encoding="utf-8")).ids, options.segment_tokens
    if len(ids) < size * options.num_segments:
        raise ValueError(f"{options.text} has {len(ids)} tokens, not {size * options.num_segments}")
    return [ids[i * size : (i + 1) * size] for i in range(options.num_segments)]


def measure_all(options: SchemeOptions) -> list[SchemeFigures]:
    """The exact cache first."""
    segments = segments_of(options)
    names = ["auto", *(name for name in options.schemes if name != "auto")]
    return [measure(name, options, segments) for name in names]


def markdown(figures: Sequence[SchemeFigures]) -> str:
    """A table; the first row is what the others are compared with."""
    exact = figures[0]
    lines = [
        "| scheme | bytes per token | loss, nats | above the exact cache | streams per GiB | times as many |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {f.scheme} | {f.bytes_per_token:,.0f} | {f.loss:.4f} | {f.loss - exact.loss:+.4f} | {f.num_streams}"
        f" | {f.num_streams / exact.num_streams:.2f} |"
        for f in figures
    ]
    return "\n".join(lines) + "\n"


def measurements(options: SchemeOptions) -> list[Measurement]:
    """Rows of `make bench`; prints the table too."""
    figures = measure_all(options)
    print(markdown(figures), end="", flush=True)
    shared: dict[str, object] = {
        "model": Path(options.model_dir).name,
        "text": options.text.name,
        "tokens": f"{options.num_segments} x {options.segment_tokens}",
        "context_tokens": options.context_tokens,
        "block_size": options.block_size,
        "dtype": options.dtype,
    }
    return [
        Measurement(
            "kv_schemes.loss",
            "nats",
            list(f.losses),
            {**shared, "scheme": f.scheme, "bytes_per_token": f.bytes_per_token, "streams_per_gib": f.num_streams},
            {"exact": figures[0].loss, "mean": f.loss},
        )
        for f in figures
    ]


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options as a group."""
    group = parser.add_argument_group("kv_schemes")
    text = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    group.add_argument("--kv-model", default=DEMO, help="directory of the model; default: %(default)s")
    group.add_argument("--kv-text", type=Path, default=text, help="held-out text; default: Python's own license")
    group.add_argument("--kv-schemes", nargs="+", default=list(KV_CACHE_DTYPES), metavar="NAME[/WINDOW/SINKS]")
    group.add_argument("--kv-block-size", type=int, default=32, help="tokens of a block; default: %(default)s")
    group.add_argument("--kv-segments", type=int, default=2, help="parts of the text; default: %(default)s")
    group.add_argument("--kv-tokens", type=int, default=512, help="of each part; default: %(default)s")


def options_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> SchemeOptions:
    """What the options ask for; ends the program when a scheme is not known."""
    options = SchemeOptions(
        args.kv_model,
        args.kv_text,
        args.kv_schemes,
        num_segments=args.kv_segments,
        segment_tokens=args.kv_tokens,
        block_size=args.kv_block_size,
    )
    for scheme in options.schemes:
        try:
            scheme_config(scheme, options)
        except ValueError as error:
            parser.error(f"--kv-schemes {scheme}: {error}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv.schemes", description=__doc__.split("\n")[0])
    add_to(parser)
    print(markdown(measure_all(options_of(parser, parser.parse_args(arguments)))), end="")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
