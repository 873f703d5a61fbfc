"""Trains the demo model's EAGLE-3 head: `python -m training.eagle`, 13 minutes of one core.

From the texts that the demo's draft learns from (training.guided); the demo model reads them again, for its hidden
states. As in EAGLE-3 the head learns on its own outputs too, several tokens ahead. Deterministic for a fixed torch
version, thread count and CPU; the same command goes on where an earlier one stopped. Knows nothing of serving.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from training import corpus, train
from training.draft import DRAFT
from training.eagle_head import Head, HeadShape, taught
from training.guided import Shard, shards
from training.llama import Llama, Shape
from training.optim import Muon

NAME = "demo-eagle3"
_SAVED_EVERY = 50  # steps
_ROW_TOKENS = 513
_DECAY = 0.8  # of the loss with each token further ahead


@dataclass(frozen=True, slots=True)
class EaglePlan:
    """One run."""

    shape: HeadShape
    num_steps: int
    rows_per_step: int = 8
    rows_together: int = 4
    depth: int = 2  # tokens ahead
    overlap_weight: float = 1.0
    overlap_temperature: float = 0.7
    matrix_lr: float = 0.03
    fusion_lr: float = 0.0015  # its inputs are some twenty times as large as those of other matrices
    head_lr: float = 0.003
    warmup_steps: int = 10

    @property
    def lrs(self) -> tuple[float, float, float]:
        """Of make_optimizers, in their order."""
        return self.matrix_lr, self.fusion_lr, self.head_lr


_LAYER = Shape(train.VOCAB_SIZE, 320, 256, 1, 2, 1, 64, train.CONTEXT_TOKENS)
EAGLE = EaglePlan(HeadShape(_LAYER, 2048, (2, 4, 6)), 550)


def distillation_loss(logits: Tensor, teacher: Tensor, ids: Tensor, plan: EaglePlan) -> Tensor:
    """logits: fp32 [tokens, draft vocabulary]; teacher: fp32 [tokens, vocabulary]. Cross-entropy from the teacher, over
    what the head can propose, and the share of tokens that both cannot have in common at `overlap_temperature`."""
    p = teacher.softmax(-1)[:, ids]
    entropy = -(p * logits.log_softmax(-1)).sum(-1).mean()
    sharp_p = (teacher / plan.overlap_temperature).softmax(-1)[:, ids]
    sharp_q = (logits / plan.overlap_temperature).softmax(-1)
    apart = 1 - torch.minimum(sharp_p, sharp_q).sum(-1).mean()
    return entropy + plan.overlap_weight * apart


def frequent_ids(texts: Tensor, count: int) -> Tensor:
    """int64 [count], rising: the tokens that come most often."""
    counts = torch.bincount(texts.flatten(), minlength=train.VOCAB_SIZE)
    return counts.topk(count).indices.sort().values


def rows_of(texts: Sequence[Shard]) -> Tensor:
    """int64 [rows, _ROW_TOKENS]: what the demo model said, and read."""
    said = [shard.said.tokens for shard in texts]
    read = [shard.read.tokens[:, : 3 * _ROW_TOKENS].reshape(-1, _ROW_TOKENS) for shard in texts]
    rows = torch.cat([*said, *read]).long()
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(train.SEED))]


def lr_scale(plan: EaglePlan, step: int) -> float:
    """Linear warm-up, then a straight line to zero."""
    return min((step + 1) / plan.warmup_steps, 1 - step / plan.num_steps)


def make_optimizers(head: Head, plan: EaglePlan) -> list[torch.optim.Optimizer]:
    """Muon for the layer's matrices, and for the one before it; Adam for the output and the norms."""
    named = dict(head.named_parameters())
    is_matrix = {name: p.ndim == 2 and name.startswith("midlayer.") for name, p in named.items()}
    matrices = [p for name, p in named.items() if is_matrix[name]]
    others = [p for name, p in named.items() if not is_matrix[name] and name != "fc.weight"]
    adam = torch.optim.Adam(others, lr=plan.head_lr, betas=(0.9, 0.98))
    return [Muon(matrices, lr=plan.matrix_lr), Muon([head.fc.weight], lr=plan.fusion_lr), adam]


@dataclass(slots=True)
class Run:
    """In progress: everything that a checkpoint holds."""

    head: Head
    optimizers: list[torch.optim.Optimizer]
    history: list[dict[str, float]]

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"head": self.head.state_dict(), "optimizers": states, "history": self.history}, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        self.head.load_state_dict(saved["head"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.history = saved["history"]

    def update(self, scale: float, base_lrs: Sequence[float]) -> None:
        """One step of the optimisers, at `scale` of the learning rates."""
        for optimizer, lr in zip(self.optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()


def loss_of(head: Head, teacher: Llama, rows: Tensor, plan: EaglePlan) -> tuple[Tensor, float]:
    """The loss on some rows of text, and how often the first token ahead is the teacher's likeliest one."""
    with torch.autocast("cpu", torch.bfloat16):
        features, guide = taught(teacher, rows[:, :-1], plan.shape.feature_layers)
        passes = head(features[:, :-1], rows[:, 1:-1], plan.depth)
    guide, ids = guide[:, 1:].float(), head.get_buffer("draft_ids")
    weights = [_DECAY**ahead for ahead in range(plan.depth)]
    total = rows.new_zeros((), dtype=torch.float32)
    for ahead, (logits, weight) in enumerate(zip(passes, weights, strict=True)):
        part = distillation_loss(logits[:, ahead:].flatten(0, 1).float(), guide[:, ahead:].flatten(0, 1), ids, plan)
        total = total + weight / sum(weights) * part
    right = ids[passes[0].argmax(-1)] == guide.argmax(-1)
    return total, float(right.float().mean())


def one_step(training: Run, plan: EaglePlan, teacher: Llama, texts: Tensor, step: int) -> dict[str, float]:
    """Learn from the rows of a step; returns what the history has of it."""
    at = (step * plan.rows_per_step + torch.arange(plan.rows_per_step)) % len(texts)
    train_loss = right = 0.0
    for rows in texts[at].split(plan.rows_together):
        loss, found = loss_of(training.head, teacher, rows, plan)
        share = len(rows) / plan.rows_per_step
        (loss * share).backward()
        train_loss += loss.item() * share
        right += found * share
    training.update(lr_scale(plan, step), plan.lrs)
    tokens = (step + 1) * plan.rows_per_step * texts.shape[1]
    training.history.append({"step": step + 1, "tokens": tokens, "train_loss": train_loss, "right": right})
    return training.history[-1]


def run(plan: EaglePlan, teacher: Llama, texts: Tensor, path: Path) -> Run:
    """Train to the plan's end, from the checkpoint at `path` if there is one. texts: of rows_of."""
    torch.manual_seed(train.SEED)
    head = Head(plan.shape, teacher, frequent_ids(texts, plan.shape.draft_vocab_size))
    training = Run(head, make_optimizers(head, plan), [])
    if path.exists():
        training.resume(path)
    first = len(training.history)
    bar = tqdm(range(first, plan.num_steps), initial=first, total=plan.num_steps, desc=NAME, unit="step")
    for step in bar:
        row = one_step(training, plan, teacher, texts, step)
        if (step + 1) % _SAVED_EVERY == 0 or step + 1 == plan.num_steps:
            training.save(path)
        bar.set_postfix(loss=f"{row['train_loss']:.3f}", right=f"{row['right']:.3f}")
    return training


def export(training: Run, directory: Path) -> None:
    """Write the directory of the head as heads are published, and the run's history."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / "model.safetensors"
    save_file(training.head.checkpoint(), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors lets the owner read only
    (directory / "config.json").write_text(json.dumps(training.head.shape.config_json(), indent=2) + "\n")
    (directory / "training_history.json").write_text(json.dumps(training.history) + "\n")
    (directory / "README.md").write_text(card(training))


def card(training: Run) -> str:
    """The model card."""
    head = training.head
    shape, layer = head.shape, head.shape.layer
    parameters = sum(p.numel() for p in head.parameters())
    layers = ", ".join(str(each) for each in shape.feature_layers)
    return f"""---
license: psf-2.0
language: [code]
pipeline_tag: text-generation
---

# {NAME}

An EAGLE-3 head (arXiv 2503.01840) of {parameters / 1e6:.1f} M parameters for `demo`: it proposes tokens from `demo`'s
own hidden states, for speculative decoding (`method: eagle3`). Alone it is of no use.

| | |
| --- | --- |
| shape | one layer, hidden {layer.hidden_size}, {layer.num_attention_heads} heads on {layer.num_key_value_heads} KV \
head of {layer.head_dim}, MLP {layer.intermediate_size}, bf16; the embedding is `demo`'s |
| proposes | {shape.draft_vocab_size} of {layer.vocab_size} tokens, those that come most often |
| hidden states | before layers {layers} of `demo` ({layers.split(", ")[-1]}: after the last) |
| trained on | {training.history[-1]["tokens"] / 1e6:.1f} M tokens that `demo` said, or read in its training modules; \
sequences of {_ROW_TOKENS} tokens |
| training | {len(training.history)} steps, Muon and Adam, seed {train.SEED}: `python -m training.eagle` |
| how often it says what `demo` says | `python -m bench.speculation.drafters --methods eagle3` |

Licence: the weights are derived from the CPython standard library, under the PSF License Agreement; the script that
makes them is under Switchyard's Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shards", type=Path, default=None, help="folder of the texts; default: build/draft-shards")
    parser.add_argument("--checkpoint", type=Path, default=None, help=f"default: build/train-{NAME}.pt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build = train.MODELS.parent / "build"
    checkpoint = args.checkpoint or build / f"train-{NAME}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    data, teacher = corpus.read(), train.load(train.DEMO)
    tok = Tokenizer.from_file(str(train.MODELS / "demo" / "tokenizer.json"))
    streams = train.encode(tok, data.sources), train.encode(tok, data.tests)
    texts = shards(args.shards or build / "draft-shards", DRAFT.num_shards, DRAFT.shard, teacher, streams)
    export(run(EAGLE, teacher, rows_of(texts), checkpoint), train.MODELS / NAME)


if __name__ == "__main__":
    main()
