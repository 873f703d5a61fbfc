"""How often a draft says what the demo model says: `python -m training.acceptance [DRAFT DIRECTORY ...]`.

Streams are the demo model's own, behind prompts from the held-out modules. A draft's token counts if it is the demo
model's at that place, where both choose as a worker does: by the same noise of the stream's seed and the position;
greedy streams have none. Given a right prefix a draft has read what the demo model said, so one pass over each stream
tells all. Knows nothing of requests and drafters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from training import corpus, train
from training.llama import Llama, Shape
from training.sampling import continued
from training.step_cost import forward_ms
from workers.parallel import ParallelGroups, Shard
from workers.sampling.params import SamplingRows
from workers.sampling.sampler import sample

_SEED = 20261130
_MOST_DRAFTED = 4
TEMPERATURES = (0.0, 0.7, 1.0)


@dataclass(frozen=True, slots=True)
class Streams:
    """What the demo model said at one temperature. token_ids: int64 [streams, prompt + said]."""

    temperature: float
    token_ids: Tensor
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of one draft on the streams of one temperature."""

    draft: str
    temperature: float
    share: float  # of all positions
    per_position: tuple[float, ...]  # in rounds of `_MOST_DRAFTED`: of those whose earlier drafts were right
    tokens_per_step: tuple[float, ...]  # with 1, 2, ... tokens drafted a step, the target's own one counted


def choices(logits: Tensor, temperature: float, positions: Sequence[int]) -> Tensor:
    """int64 [streams, positions]: a worker's choices from fp32 [streams, positions, vocab], each stream with a seed of
    its own, at these positions of its completion."""
    num_streams, _, vocab_size = logits.shape
    sampling = SamplingRows.greedy(num_streams * len(positions))
    sampling.temperature[:] = temperature
    sampling.seed[:] = np.repeat(_SEED + np.arange(num_streams, dtype=np.uint64), len(positions))
    at = np.tile(np.asarray(positions, np.int64), num_streams)
    groups = ParallelGroups(Shard(), logits.device)
    return sample(logits.flatten(0, 1), sampling, at, groups, vocab_size).view(num_streams, -1)


def streams(target: Llama, prompts: Tensor, num_tokens: int, temperature: float) -> Streams:
    """The target's own text behind each prompt [streams, length]."""

    def choose(logits: Tensor, index: int) -> Tensor:
        return choices(logits[:, None], temperature, [index])

    said = continued(target, prompts, num_tokens, choose, torch.float32)
    return Streams(temperature, said, prompts.shape[1])


@torch.no_grad()
def is_right(draft: Llama, said: Streams) -> Tensor:
    """bool [streams, said tokens]: whether the draft would have said the same there."""
    first, end = said.num_prompt_tokens, said.token_ids.shape[1]
    logits = torch.cat([draft(row[None, :-1])[:, first - 1 :] for row in said.token_ids])
    return choices(logits, said.temperature, range(end - first)) == said.token_ids[:, first:]


def rounds(right: Tensor, num_drafted: int) -> list[int]:
    """How many drafts were right in each step of each stream. A step goes on behind them and the target's own token."""
    found = []
    for flags in right.tolist():
        start = 0
        while start + num_drafted <= len(flags):
            run = flags[start : start + num_drafted]
            found.append(run.index(False) if False in run else num_drafted)
            start += found[-1] + 1
    return found


def acceptance(name: str, draft: Llama, said: Streams) -> Acceptance:
    """All figures of a draft."""
    right = is_right(draft, said)
    counts = rounds(right, _MOST_DRAFTED)
    reached = [sum(count >= position for count in counts) for position in range(_MOST_DRAFTED + 1)]
    steps = [rounds(right, most) for most in range(1, _MOST_DRAFTED + 1)]
    return Acceptance(
        name,
        said.temperature,
        float(right.float().mean()),
        tuple(after / max(1, before) for before, after in pairwise(reached)),
        tuple(1 + sum(each) / len(each) for each in steps),
    )


def prompts_of(tok: Tokenizer, documents: Sequence[str], count: int, length: int) -> Tensor:
    """int64 [count, length], from anywhere in the documents."""
    ids = train.encode(tok, list(documents))
    starts = torch.randint(len(ids) - length, (count,), generator=torch.Generator().manual_seed(_SEED))
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def shape_of(directory: Path) -> Shape:
    """Of a model that this package has exported."""
    config = json.loads((directory / "config.json").read_text())
    return Shape(*(config[name] for name in Shape.__slots__))


@dataclass(frozen=True, slots=True)
class Costs:
    """In plain steps of the target, at batch 1; see training.step_cost."""

    draft: str
    draft_step: float
    verify: tuple[float, ...]  # of 1, 2, ... drafted tokens and the one before them

    @classmethod
    def measured(cls, draft: Path, target: Path) -> Costs:
        """On this machine."""
        plain = forward_ms(target, 1)
        verify = tuple(forward_ms(target, count + 1) / plain for count in range(1, _MOST_DRAFTED + 1))
        return cls(draft.name, forward_ms(draft, 1) / plain, verify)

    def speed_up(self, found: Acceptance) -> tuple[float, ...]:
        """Over plain decoding, with 1, 2, ... tokens drafted a step; of forward passes alone."""
        return tuple(
            tokens / (verify + count * self.draft_step)
            for count, (tokens, verify) in enumerate(zip(found.tokens_per_step, self.verify, strict=True), start=1)
        )


def describe(found: Acceptance, costs: Costs) -> str:
    """As one line."""
    speed_ups = " ".join(f"{value:.2f}" for value in costs.speed_up(found))
    positions = " ".join(f"{share:.2f}" for share in found.per_position)
    tokens = " ".join(f"{count:.2f}" for count in found.tokens_per_step)
    return (
        f"{found.draft:14} T {found.temperature:3.1f}: {found.share:.3f} of all positions; in chains {positions};"
        f" with 1 to {_MOST_DRAFTED} drafted {tokens} tokens a step, speed-up {speed_ups}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafts", type=Path, nargs="*", default=[train.MODELS / "demo-draft"], metavar="DIRECTORY")
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt, and as many behind it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    args = parser.parse_args()
    if args.streams < 1 or not _MOST_DRAFTED <= args.tokens <= train.CONTEXT_TOKENS // 2:
        parser.error(f"--streams must be positive, --tokens from {_MOST_DRAFTED} to {train.CONTEXT_TOKENS // 2}")
    for directory in args.drafts:
        if not (directory / "config.json").exists():
            parser.error(f"DIRECTORY: {directory} has no config.json")
    torch.set_num_threads(args.threads)
    target = train.load(train.DEMO)
    tok = Tokenizer.from_file(str(train.MODELS / "demo" / "tokenizer.json"))
    prompts = prompts_of(tok, corpus.read().held_out, args.streams, args.tokens)
    drafts = [(path.name, train.load_directory(path, shape_of(path))) for path in args.drafts]
    costs = {path.name: Costs.measured(path, train.MODELS / "demo") for path in args.drafts}
    out = sys.stderr if args.json else sys.stdout
    for each in costs.values():
        verify = " ".join(f"{value:.2f}" for value in each.verify)
        print(
            f"{each.draft}: a step costs {each.draft_step:.2f} of the target's; its own over 2 to 5 tokens: {verify}",
            file=out,
        )
    for temperature in tqdm(TEMPERATURES, desc="temperatures", file=sys.stderr, leave=False):
        said = streams(target, prompts, args.tokens, temperature)
        for name, draft in drafts:
            found = acceptance(name, draft, said)
            print(json.dumps(asdict(found)) if args.json else describe(found, costs[name]), flush=True)


if __name__ == "__main__":
    main()
