"""Distils the demo model's draft: `python -m training.draft`, 20 minutes of one core.

First the demo model says and reads text (build/draft-shards), then the draft learns its distributions. Deterministic
for a fixed torch version, thread count and CPU; the same command goes on where an earlier one stopped.
Knows nothing of serving.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from training import corpus, train
from training.guided import Guided, Shard, ShardPlan, shards
from training.llama import Llama, Shape
from training.train import Training

_SAVED_EVERY = 100  # steps
_MEASURED_WINDOWS = 8
_TEXT_SHARE = 0.1
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """One run. A step has `said_rows` of what the teacher said and `read_rows` of what it read."""

    base: train.Plan  # name, shape, steps and learning rates
    num_shards: int = 6
    shard: ShardPlan = field(default_factory=ShardPlan)
    said_rows: int = 12
    read_rows: int = 1
    overlap_weight: float = 1.0
    overlap_temperature: float = 0.7
    is_compiled: bool = True

    @property
    def tokens_per_step(self) -> int:
        """Of all rows."""
        return self.said_rows * self.shard.said_tokens + self.read_rows * self.shard.read_tokens


DRAFT_SHAPE = Shape(train.VOCAB_SIZE, 192, 896, 1, 4, 2, 64, train.CONTEXT_TOKENS)
DRAFT = DraftPlan(train.Plan("demo-draft", DRAFT_SHAPE, 1200, slope_steps=1200, cooldown_steps=1, warmup_steps=40))


def distillation_loss(logits: Tensor, guide: Guided, plan: DraftPlan) -> Tensor:
    """logits: fp32 [rows, length, vocab]. Nats a token of three kinds.

    The KL divergence from the teacher (its likeliest tokens one by one, the others as one), a little of the text
    itself, and the share of tokens that a draft at `overlap_temperature` can have in common with the teacher at best.
    """
    ids, log_p = guide.top_ids.long(), guide.top_logprobs.float()
    total = logits.logsumexp(-1, keepdim=True)
    top_logits = logits.gather(-1, ids)
    log_q, p = top_logits - total, log_p.exp()
    p_rest, q_rest = (1 - each.sum(-1) for each in (p, log_q.exp()))
    divergence = (p * (log_p - log_q)).sum(-1) - p_rest.clamp(min=0) * q_rest.clamp(min=_LEAST).log()
    text = (total - logits.gather(-1, guide.tokens[:, 1:, None].long())).mean()
    sharp_p = F.softmax(log_p / plan.overlap_temperature, dim=-1)
    sharp_q = (top_logits / plan.overlap_temperature - (logits / plan.overlap_temperature).logsumexp(-1, True)).exp()
    apart = 1 - torch.minimum(sharp_p, sharp_q).sum(-1).mean()
    return (1 - _TEXT_SHARE) * divergence.mean() + _TEXT_SHARE * text + plan.overlap_weight * apart


@torch.no_grad()
def begin_at(model: Llama, teacher: Llama) -> None:
    """The teacher's embedding, as the head sees it, in the directions that hold most of it."""
    wide = teacher.embed_tokens.weight * teacher.norm.weight
    directions = torch.linalg.svd(wide, full_matrices=False).Vh[: model.shape.hidden_size]
    model.embed_tokens.weight.copy_(wide @ directions.T)


class Rows:
    """All rows of some kind, in a new order each time they have been seen."""

    def __init__(self, parts: Sequence[Guided], seed: int) -> None:
        self._parts = parts
        self._per_part = len(parts[0].tokens)
        self._seed = seed

    def at(self, step: int, count: int) -> Guided:
        """The rows of a step."""
        total = self._per_part * len(self._parts)
        found = []
        for number in range(step * count, (step + 1) * count):
            generator = torch.Generator().manual_seed(self._seed + number // total)
            row = int(torch.randperm(total, generator=generator)[number % total])
            at = row % self._per_part
            found.append(self._parts[row // self._per_part].rows(slice(at, at + 1)))
        return Guided(*(torch.cat([getattr(row, name) for row in found]) for name in Guided.__slots__))


def micro_batches(plan: DraftPlan, said: Rows, read: Rows, step: int) -> list[Guided]:
    """What one step learns from, in parts of `micro_batch_tokens`."""
    found = []
    for rows, count, length in (
        (said, plan.said_rows, plan.shard.said_tokens),
        (read, plan.read_rows, plan.shard.read_tokens),
    ):
        together = max(1, plan.base.micro_batch_tokens // length)
        whole = rows.at(step, count)
        found += [whole.rows(slice(start, start + together)) for start in range(0, count, together)]
    return found


def run(
    plan: DraftPlan, teacher: Llama, texts: Sequence[Shard], held_out: Sequence[str], tok: Tokenizer, path: Path
) -> Training:
    """Train to the plan's end, from the checkpoint at `path` if there is one."""
    base = plan.base
    training = Training.start(base)
    begin_at(training.model, teacher)
    if path.exists():
        training.resume(path)
    said, read = Rows([t.said for t in texts], train.SEED), Rows([t.read for t in texts], train.SEED + 10**6)

    def loss_of(tokens: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = training.model(tokens[:, :-1].long())
        return distillation_loss(logits.float(), Guided(tokens, top_ids, top_logprobs), plan)

    if plan.is_compiled:
        loss_of = torch.compile(loss_of, dynamic=False)
    first = training.num_steps_done
    bar = tqdm(range(first, base.num_steps), initial=first, total=base.num_steps, desc=base.name, unit="step")
    for step in bar:
        train_loss = 0.0
        for part in micro_batches(plan, said, read, step):
            share = part.top_ids.shape[0] * part.top_ids.shape[1] / plan.tokens_per_step
            loss = loss_of(part.tokens, part.top_ids, part.top_logprobs) * share
            loss.backward()
            train_loss += loss.item()
        training.update(train.lr_scale(base, step), (base.matrix_lr, base.embedding_lr))
        training.num_steps_done = step + 1
        row = {"step": step + 1, "tokens": (step + 1) * plan.tokens_per_step, "train_loss": train_loss}
        training.history.append(row)
        if (step + 1) % _SAVED_EVERY == 0 or step + 1 == base.num_steps:
            row["held_out_bpb"] = train.bits_per_byte(training.model, tok, list(held_out), _MEASURED_WINDOWS)
            training.save(path)
        bar.set_postfix(loss=f"{train_loss:.3f}")
    return training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shards", type=Path, default=None, help="folder of the texts; default: build/draft-shards")
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: build/train-demo-draft.pt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build = train.MODELS.parent / "build"
    checkpoint = args.checkpoint or build / f"train-{DRAFT.base.name}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    data, teacher = corpus.read(), train.load(train.DEMO)
    tok = Tokenizer.from_file(str(train.MODELS / "demo" / "tokenizer.json"))
    streams = train.encode(tok, data.sources), train.encode(tok, data.tests)
    texts = shards(args.shards or build / "draft-shards", DRAFT.num_shards, DRAFT.shard, teacher, streams)
    training = run(DRAFT, teacher, texts, data.held_out, tok, checkpoint)
    train.export(training.model, tok, DRAFT.base, training.history)


if __name__ == "__main__":
    main()
