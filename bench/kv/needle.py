"""Whether a model still finds a sentence in a long text when its cache is quantized: needle retrieval.

    python -m bench.kv.needle --kv-model DIR --kv-schemes auto kivi2 kivi4   # a table: of how many needles each finds

A needle is a sentence with a number, put into held-out text at several depths; the prompt ends with the beginning of
the same sentence, and the model is to complete the number. Knows nothing of routers and clusters.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer

from bench.kv.schemes import CPU, SchemeOptions, add_to, options_of, scheme_config
from workers.engine.request import Request
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import make_engine, make_executor
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_CITIES = ("Paris", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Seoul", "Rome", "Bonn", "Kyoto")


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt, and what it is to be completed by."""

    token_ids: list[int]
    answer: str


def needles(options: SchemeOptions, per_depth: int) -> Iterator[Needle]:
    """Of each depth so many, in texts of options.segment_tokens tokens."""
    tokenizer = Tokenizer.from_file(f"{options.model_dir}/tokenizer.json")
    hay = tokenizer.encode(options.text.read_text(encoding="utf-8")).ids
    pick = random.Random(0)
    for depth in DEPTHS:
        for _ in range(per_depth):
            city, number = pick.choice(_CITIES), str(pick.randrange(1000, 9999))
            said = tokenizer.encode(f"\nThe special magic number of {city} is {number}.\n").ids
            asked = tokenizer.encode(f"\nThe special magic number of {city} is").ids
            room = options.segment_tokens - len(said) - len(asked)
            first = pick.randrange(max(1, len(hay) - room))
            text = hay[first : first + room]
            at = int(depth * len(text))
            yield Needle([*text[:at], *said, *text[at:], *asked], number)


def num_found(scheme: str, options: SchemeOptions, wanted: Sequence[Needle]) -> int:
    """Of the needles, those whose number the model completes."""
    config = scheme_config(scheme, replace(options, segment_tokens=options.segment_tokens + 16))
    tokenizer = Tokenizer.from_file(f"{options.model_dir}/tokenizer.json")
    model, groups = load_config(options.model_dir), ParallelGroups(Shard(), CPU)
    runner = TorchModelRunner(config, model, groups, CPU)
    engine = make_engine(config, model, runner, make_executor(config, runner, groups), b"", clock=lambda: 0.0)
    count = 0
    for index, needle in enumerate(wanted):
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        engine.submit(Request(f"n{index}", list(needle.token_ids), len(needle.token_ids), sampling))
        completion: list[int] = []
        while engine.scheduler.has_work():
            events = engine.step()
            completion += [token.token_id for token in events.tokens] if events is not None else []
        count += needle.answer in tokenizer.decode(completion)
    engine.close()
    return count


def main(arguments: Sequence[str]) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv.needle", description=__doc__.split("\n")[0])
    add_to(parser)
    parser.add_argument("--per-depth", type=int, default=4, help="needles at each depth; default: %(default)s")
    args = parser.parse_args(arguments)
    options = options_of(parser, args)
    wanted = list(needles(options, args.per_depth))
    print(
        f"| scheme | needles found, of {len(wanted)} in {options.segment_tokens} tokens |\n| --- | ---: |", flush=True
    )
    for scheme in options.schemes:
        print(f"| {scheme} | {num_found(scheme, options, wanted)} |", flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
