"""Trains an adapter: batches, the optimiser, checkpoints, perplexity. Knows nothing of options or files of adapters."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.qlora.adapter import LoraOptions
from training.qlora.data import Rows
from training.qlora.model import AdaptedModel

_SAVED_EVERY = 10  # steps
_ROWS_AT_ONCE = 4
_LARGEST_NORM = 1.0  # of a step's gradient


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. The learning rate rises over the first tenth of the steps and falls in a straight line to zero."""

    options: LoraOptions
    num_steps: int
    batch_rows: int
    lr: float
    seed: int
    is_bf16: bool = False  # products of a step; sums and the adapter itself are fp32

    def lr_at(self, step: int) -> float:
        """Of one step."""
        rise = (step + 1) / max(1, self.num_steps // 10)
        return self.lr * min(1.0, rise, 1 - step / self.num_steps)


def batch_of(rows: Tensor, plan: Plan, step: int) -> Tensor:
    """Rows of one step; all are seen once before any is seen again. By the step alone: a resumed run sees the same."""
    found = []
    for number in range(step * plan.batch_rows, (step + 1) * plan.batch_rows):
        generator = torch.Generator().manual_seed(plan.seed + number // len(rows))
        found.append(rows[torch.randperm(len(rows), generator=generator)[number % len(rows)]])
    return torch.stack(found)


@torch.no_grad()
def mean_nats(model: AdaptedModel, rows: Tensor) -> float:
    """Of the tokens of all rows, each with what stands before it in its row."""
    losses = [_loss(model, part) * len(part) for part in rows.split(_ROWS_AT_ONCE)]
    return float(torch.stack(losses).sum() / len(rows))


def perplexity(model: AdaptedModel, rows: Tensor) -> float:
    """Of the tokens of all rows."""
    return math.exp(mean_nats(model, rows))


def _loss(model: AdaptedModel, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())


class Training:
    """A run in progress."""

    def __init__(self, plan: Plan, model: AdaptedModel, rows: Rows, base: str) -> None:
        """base: tells the base model's weights from others."""
        self._plan, self._model, self._rows = plan, model, rows
        self._run = {"plan": asdict(plan), "rows": rows.digest, "base": base}
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.0)
        self.history: list[dict[str, float]] = []

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError where it is not of this run."""
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True)
            run = saved["run"]
        except Exception as error:  # whatever a damaged file makes of torch's reader
            raise ValueError(f"--checkpoint: {path}: not a checkpoint of this command ({error})") from None
        for name, value in self._run.items():
            if run.get(name) != value:
                raise ValueError(f"--checkpoint: {path} was begun with another {name}; remove it or name another")
        self._model.load_state_dict(saved["adapter"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.history = saved["history"]

    def save(self, path: Path) -> None:
        """Write a checkpoint; the one before is there until this one is whole."""
        unfinished = path.with_name(path.name + ".unfinished")
        state = {
            "run": self._run,
            "adapter": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "history": self.history,
        }
        torch.save(state, unfinished)
        unfinished.rename(path)

    def run(self, path: Path) -> None:
        """To the plan's end, with a checkpoint at `path` every few steps."""
        first, count = len(self.history), self._plan.num_steps
        bar = tqdm(range(first, count), initial=first, total=count, desc="adapter", unit="step", file=sys.stderr)
        for step in bar:
            loss = self._step(step)
            self.history.append({"step": step + 1, "loss_nats": loss})
            bar.set_postfix(loss=f"{loss:.4f}")
            if (step + 1) % _SAVED_EVERY == 0 or step + 1 == count:
                self.save(path)

    def _step(self, step: int) -> float:
        batch = batch_of(self._rows.train, self._plan, step)
        total = 0.0
        for part in batch.split(_ROWS_AT_ONCE):
            with torch.autocast("cpu", torch.bfloat16, enabled=self._plan.is_bf16):
                loss = _loss(self._model, part) * (len(part) / len(batch))
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _LARGEST_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.lr_at(step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total
