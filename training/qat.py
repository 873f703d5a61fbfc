"""Trains the demo model while its weights are rounded: `python -m training.qat w4 --out DIR`, or `ternary`.

The model that is served is the model that is trained: its loss is the divergence from the demo model as it is. Starts
from the demo's weights. Deterministic for a fixed torch version and thread count; goes on at its checkpoint with the
same command. Knows nothing of serving.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from training import corpus, train
from training.llama import Llama
from training.rounded import RoundedLinear, TernaryLinear, W4Linear
from training.rounded_export import export

_MEASURED_BLOCKS, _BLOCK_TOKENS = 40, 512
_SAVED_EVERY = 10  # steps
_WARMUP_STEPS = 10


@dataclass(frozen=True, slots=True)
class QatPlan:
    """One run. Only what is rounded is trained, unless trains_all."""

    kind: str
    base: train.Plan  # shape, and how batches are drawn
    lr: float
    trains_all: bool
    scale_lr: float = 0.0


def plan_for(kind: str, num_steps: int, batch_tokens: int = 2048) -> QatPlan:
    """w4 or ternary, of the demo model."""
    base = train.Plan(f"demo-{kind}", train.DEMO.shape, num_steps, batch_tokens, cooldown_steps=0)
    if kind == "w4":
        return QatPlan(kind, base, lr=2e-4, trains_all=False, scale_lr=2e-5)
    return QatPlan(kind, base, lr=1e-3, trains_all=True)


_LINEARS: dict[str, Callable[[Tensor], RoundedLinear]] = {"w4": W4Linear, "ternary": TernaryLinear}
KINDS = tuple(_LINEARS)


def rounded_model(teacher: Llama, make: Callable[[Tensor], RoundedLinear]) -> Llama:
    """A copy of the teacher whose layers' matrices are rounded."""
    model = Llama(teacher.shape)
    model.load_state_dict(teacher.state_dict())
    for module in list(model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child.weight))
    return model


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's distributions from the teacher's, nats a token."""
    log_q, log_p = F.log_softmax(student, dim=-1).flatten(0, 1), F.log_softmax(teacher, dim=-1).flatten(0, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@torch.no_grad()
def added_nats(model: Llama, teacher: Llama, blocks: Tensor) -> float:
    """What a model loses to the teacher on blocks [blocks, tokens], nats a token."""
    total = 0.0
    for row in blocks:
        nats = [F.cross_entropy(each(row[None, :-1])[0], row[1:]) for each in (model, teacher)]
        total += float(nats[0] - nats[1]) / len(blocks)
    return total


def held_out_blocks(tok: Tokenizer, documents: Sequence[str]) -> Tensor:
    """The longest documents first, cut into blocks."""
    ids = train.encode(tok, sorted(documents, key=len, reverse=True))
    count = min(_MEASURED_BLOCKS, len(ids) // _BLOCK_TOKENS)
    return ids[: count * _BLOCK_TOKENS].view(count, _BLOCK_TOKENS)


@dataclass(slots=True)
class QatTraining:
    """A run in progress: everything that a checkpoint holds."""

    plan: QatPlan
    model: Llama
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]]
    num_steps_done: int = 0

    @classmethod
    def start(cls, plan: QatPlan, teacher: Llama) -> QatTraining:
        """From the teacher's weights."""
        torch.manual_seed(train.SEED)
        model = rounded_model(teacher, _LINEARS[plan.kind])
        named = dict(model.named_parameters())
        scales = [p for name, p in named.items() if name.endswith(".scale")]
        matrices = [p for name, p in named.items() if p.ndim == 2 and "layers" in name and name.endswith(".weight")]
        groups = [{"params": matrices, "base_lr": plan.lr}, {"params": scales, "base_lr": plan.scale_lr}]
        chosen = {id(p) for p in (*scales, *matrices)}
        others = [p for p in named.values() if id(p) not in chosen]
        if plan.trains_all:
            groups.append({"params": others, "base_lr": plan.lr})
        else:
            for parameter in others:
                parameter.requires_grad_(False)
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.98))
        return cls(plan, model, optimizer, [])

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "step": self.num_steps_done,
            "plan": repr(self.plan),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError for one of another plan."""
        saved = torch.load(path, weights_only=True)
        if saved["plan"] != repr(self.plan):
            raise ValueError(f"--checkpoint: {path} was begun with other options; remove it or name another")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history, self.num_steps_done = saved["history"], saved["step"]

    def step(self, teacher: Llama, rows: Tensor) -> float:
        """One update; the divergence before it."""
        inputs = rows[:, :-1]
        with torch.no_grad():
            guide = teacher(inputs)
        loss = divergence(self.model(inputs), guide)
        loss.backward()
        share = 1 - self.num_steps_done / self.plan.base.num_steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(share, (self.num_steps_done + 1) / _WARMUP_STEPS)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps_done += 1
        return float(loss.detach())


def run(plan: QatPlan, teacher: Llama, streams: tuple[Tensor, Tensor], checkpoint: Path) -> QatTraining:
    """Train to the plan's end, from the checkpoint if there is one."""
    training = QatTraining.start(plan, teacher)
    if checkpoint.exists():
        training.resume(checkpoint)
    first, count = training.num_steps_done, plan.base.num_steps
    bar = tqdm(range(first, count), initial=first, total=count, desc=plan.base.name, unit="step", file=sys.stderr)
    for step in bar:
        kl = training.step(teacher, train.batch_at(streams, plan.base, step))
        training.history.append({"step": step + 1, "kl_nats": kl})
        bar.set_postfix(kl=f"{kl:.4f}")
        if (step + 1) % _SAVED_EVERY == 0 or step + 1 == count:
            training.save(checkpoint)
    return training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True, help="a model directory that is not there yet")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: build/qat-KIND-STEPS.pt")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} is there already")
    if args.steps < 1 or args.batch_tokens < train.DEMO.short_tokens:
        parser.error(f"--steps must be at least 1, and --batch-tokens at least {train.DEMO.short_tokens}")
    torch.set_num_threads(args.threads)
    plan = plan_for(args.kind, args.steps, args.batch_tokens)
    name = f"qat-{args.kind}-{args.steps}x{args.batch_tokens}.pt"
    data, teacher = corpus.read(), train.load(train.DEMO)
    tok = Tokenizer.from_file(str(train.MODELS / "demo" / "tokenizer.json"))
    blocks = held_out_blocks(tok, data.held_out)
    before = added_nats(rounded_model(teacher, _LINEARS[args.kind]), teacher, blocks)
    streams = train.encode(tok, data.sources), train.encode(tok, data.tests)
    try:
        training = run(plan, teacher, streams, args.checkpoint or train.MODELS.parent / "build" / name)
    except ValueError as error:
        parser.error(str(error))
    after = added_nats(training.model, teacher, blocks)
    export(training.model, train.MODELS / "demo", args.out)
    (args.out / "training_history.json").write_text(json.dumps(training.history) + "\n")
    print(f"{args.out}: loss {before:+.4f} rounded as it was, {after:+.4f} trained (nats a token, held out)")


if __name__ == "__main__":
    main()
