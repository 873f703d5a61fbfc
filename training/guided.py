"""What a draft learns from: text with the demo model's own distribution at each token, in shards on disk.

A shard has text that the demo model said, behind prompts cut from the training modules, and text of those modules. It
is drawn by its own seed; a shard that is there is not made again. Knows nothing of how a draft learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from training.llama import Llama
from training.sampling import by_chance, continued, top_logprobs

SEED = 20261129
PROMPT_TOKENS = (32, 64, 128, 256)  # in turn, a batch each
TEMPERATURES = (0.7, 1.0, 0.7, 1.0, 0.7, 0.0)  # in turn, a row each
SOURCES_SHARE = 0.75  # of rows, the others are of the tests: what is asked of the demo model is rather library code


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Rows of one shard."""

    said_rows: int = 256
    said_tokens: int = 512
    read_rows: int = 64
    read_tokens: int = 2048  # the whole context, so that its last positions are known too
    sampled_together: int = 64


@dataclass(frozen=True, slots=True)
class Guided:
    """Rows of equal length. tokens: int16 [rows, length + 1]; top_ids, top_logprobs: of the token after each of the
    first `length`, int16 and fp16 [rows, length, NUM_TOP]."""

    tokens: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def rows(self, chosen: slice) -> Guided:
        """Some of the rows."""
        return Guided(self.tokens[chosen], self.top_ids[chosen], self.top_logprobs[chosen])


@dataclass(frozen=True, slots=True)
class Shard:
    """What the demo model said, and what it read."""

    said: Guided
    read: Guided


def _cut(streams: tuple[Tensor, Tensor], count: int, length: int, generator: torch.Generator) -> Tensor:
    """Token ids [count, length] from anywhere in the streams (sources, tests)."""
    rows = []
    for share in torch.rand(count, generator=generator).tolist():
        stream = streams[share >= SOURCES_SHARE]
        start = int(torch.randint(len(stream) - length, (), generator=generator))
        rows.append(stream[start : start + length])
    return torch.stack(rows)


def _said(plan: ShardPlan, teacher: Llama, streams: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    parts = []
    for batch in range(plan.said_rows // plan.sampled_together):
        length = PROMPT_TOKENS[batch % len(PROMPT_TOKENS)] * plan.said_tokens // 512
        prompts = _cut(streams, plan.sampled_together, length, generator)
        temperatures = torch.tensor(TEMPERATURES).repeat(-(-len(prompts) // len(TEMPERATURES)))[: len(prompts)]
        choose = by_chance(temperatures, generator)
        parts.append(continued(teacher, prompts, plan.said_tokens + 1 - length, choose, torch.bfloat16))
    return torch.cat(parts)[torch.randperm(plan.said_rows, generator=generator)]


def _guided(teacher: Llama, tokens: Tensor) -> Guided:
    found = [top_logprobs(teacher, row[None, :-1]) for row in tokens]
    ids, logprobs = (torch.cat(part) for part in zip(*found, strict=True))
    return Guided(tokens.to(torch.int16), ids, logprobs)


def make_shard(plan: ShardPlan, teacher: Llama, streams: tuple[Tensor, Tensor], seed: int) -> Shard:
    """One shard. streams: (sources, tests), int64."""
    generator = torch.Generator().manual_seed(seed)
    said = _said(plan, teacher, streams, generator)
    read = _cut(streams, plan.read_rows, plan.read_tokens + 1, generator)
    return Shard(_guided(teacher, said), _guided(teacher, read))


def _write(shard: Shard, path: Path) -> None:
    tensors = {
        f"{kind}.{name}": getattr(part, name).contiguous()
        for kind, part in (("said", shard.said), ("read", shard.read))
        for name in Guided.__slots__
    }
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    unfinished.rename(path)


def _read(path: Path) -> Shard:
    tensors = load_file(path)
    said, read = (Guided(*(tensors[f"{kind}.{name}"] for name in Guided.__slots__)) for kind in ("said", "read"))
    return Shard(said, read)


def shards(
    folder: Path, count: int, plan: ShardPlan, teacher: Llama, streams: tuple[Tensor, Tensor]
) -> Sequence[Shard]:
    """All of them, made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    return list(_shards(folder, count, plan, teacher, streams))


def _shards(
    folder: Path, count: int, plan: ShardPlan, teacher: Llama, streams: tuple[Tensor, Tensor]
) -> Iterator[Shard]:
    for index in tqdm(range(count), desc="text that the demo model says and reads", unit="shard"):
        path = folder / f"{index:03}.safetensors"
        if not path.exists():
            _write(make_shard(plan, teacher, streams, SEED + index), path)
        yield _read(path)
