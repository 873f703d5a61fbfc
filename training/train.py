"""Trains the demo model: `python -m training.train`.

Deterministic for a fixed seed, torch version and thread count; stops and resumes at any checkpoint (--checkpoint).
Knows nothing of serving.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from training import corpus, tokenizer
from training.llama import Llama, Shape
from training.optim import Muon

MODELS = Path(__file__).resolve().parents[1] / "models"
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 2048
SEED = 20261120


@dataclass(frozen=True, slots=True)
class Plan:
    """One training run. Batches hold `batch_tokens` tokens: short sequences first, the full context at the end.

    Half of a batch comes from the library's sources and half from its tests, of which there are twice as many.
    """

    name: str
    shape: Shape
    num_steps: int
    batch_tokens: int = 8192
    micro_batch_tokens: int = 2048  # what one forward and backward pass holds: more leaves the CPU's caches
    short_tokens: int = 512
    slope_steps: int = 900  # the learning rate falls in a straight line that would reach zero here
    cooldown_steps: int = 80  # the last steps: full context, and the learning rate falls to zero
    matrix_lr: float = 0.02
    embedding_lr: float = 0.004
    warmup_steps: int = 20


DEMO = Plan("demo", Shape(VOCAB_SIZE, 320, 768, 6, 4, 2, 64, CONTEXT_TOKENS), num_steps=800)


def encode(tok: Tokenizer, documents: list[str]) -> Tensor:
    """All documents as one int64 stream, each after an end-of-text token."""
    stream: list[int] = []
    for encoding in tok.encode_batch(documents):
        stream.append(0)
        stream.extend(encoding.ids)
    return torch.tensor(stream, dtype=torch.int64)


def batch_at(streams: tuple[Tensor, Tensor], plan: Plan, step: int) -> Tensor:
    """Token ids [rows, length + 1] of one step, drawn by the step's own seed, so that a resumed run sees the same.

    Rows come from the streams (sources, tests) in turn.
    """
    length = CONTEXT_TOKENS if step >= plan.num_steps - plan.cooldown_steps else plan.short_tokens
    generator = torch.Generator().manual_seed(SEED + step)
    rows = []
    for row in range(plan.batch_tokens // length):
        stream = streams[row % len(streams)]
        start = int(torch.randint(len(stream) - length - 1, (), generator=generator))
        rows.append(stream[start : start + length + 1])
    return torch.stack(rows)


def lr_scale(plan: Plan, step: int) -> float:
    """Linear warm-up, a long straight line down, and a steeper one to zero."""
    main_steps = plan.num_steps - plan.cooldown_steps
    slope = 1 - min(step, main_steps) / plan.slope_steps
    cooldown = (plan.num_steps - max(step, main_steps)) / plan.cooldown_steps
    return min((step + 1) / plan.warmup_steps, slope * cooldown)


@torch.no_grad()
def bits_per_byte(model: Llama, tok: Tokenizer, documents: list[str], limit_windows: int | None = None) -> float:
    """Held-out compression; a token is predicted from at least half a context of its own document, once it has one."""
    nats, half = 0.0, CONTEXT_TOKENS // 2
    num_bytes, windows = 0, 0
    for text in documents:
        ids = encode(tok, [text])
        counted = 1  # the end-of-text token itself is given
        start = 0
        while counted < len(ids) and (limit_windows is None or windows < limit_windows):
            window = ids[start : start + CONTEXT_TOKENS]
            logits = model(window[None, :-1])[0]
            losses = F.cross_entropy(logits, window[1:], reduction="none")
            fresh = window[1:][counted - start - 1 :]
            nats += losses[counted - start - 1 :].sum().item()
            num_bytes += len(tok.decode(fresh.tolist(), skip_special_tokens=False).encode())
            counted = start + len(window)
            start += half
            windows += 1
    return nats / torch.log(torch.tensor(2.0)).item() / num_bytes


@dataclass(slots=True)
class Training:
    """A run in progress: everything that a checkpoint holds."""

    model: Llama
    optimizers: list[torch.optim.Optimizer]
    history: list[dict[str, float]]
    num_steps_done: int

    @classmethod
    def start(cls, plan: Plan) -> Training:
        """A fresh model: Muon for the layers' matrices, Adam for the embedding and the norms."""
        torch.manual_seed(SEED)
        model = Llama(plan.shape)
        is_matrix = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
        matrices = [p for name, p in model.named_parameters() if is_matrix[name]]
        others = [p for name, p in model.named_parameters() if not is_matrix[name]]
        adam = torch.optim.Adam(others, lr=plan.embedding_lr, betas=(0.9, 0.98))
        return cls(model, [Muon(matrices, lr=plan.matrix_lr), adam], [], 0)

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "history": self.history,
            "step": self.num_steps_done,
        }
        torch.save(state, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.history, self.num_steps_done = saved["history"], saved["step"]

    def update(self, scale: float, base_lrs: tuple[float, float]) -> None:
        """One optimiser step, at `scale` of the plan's learning rates."""
        for optimizer, lr in zip(self.optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()


def run(plan: Plan, tok: Tokenizer, data: corpus.Corpus, checkpoint: Path) -> Training:
    """Train to the plan's end, from the checkpoint if there is one."""
    training = Training.start(plan)
    if checkpoint.exists():
        training.resume(checkpoint)
    streams = encode(tok, data.sources), encode(tok, data.tests)

    @torch.compile(dynamic=False)
    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(training.model(inputs).flatten(0, 1), targets.flatten())

    first = training.num_steps_done
    bar = tqdm(range(first, plan.num_steps), initial=first, total=plan.num_steps, desc=plan.name, unit="step")
    for step in bar:
        batch = batch_at(streams, plan, step)
        micro_batches = batch.split(plan.micro_batch_tokens // (batch.shape[1] - 1))
        train_loss = 0.0
        for rows in micro_batches:
            loss = loss_of(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) / len(micro_batches)
            loss.backward()
            train_loss += loss.item()
        training.update(lr_scale(plan, step), (plan.matrix_lr, plan.embedding_lr))
        training.num_steps_done = step + 1
        row = {"step": step + 1, "tokens": (step + 1) * plan.batch_tokens, "train_loss": train_loss}
        training.history.append(row)
        if (step + 1) % 50 == 0 or step + 1 == plan.num_steps:
            row["held_out_bpb"] = bits_per_byte(training.model, tok, data.held_out, limit_windows=8)
            training.save(checkpoint)
            bar.write(f"step {step + 1}: {row['held_out_bpb']:.3f} bits per byte held out (a sample)")
        bar.set_postfix(loss=f"{train_loss:.3f}")
    return training


def export(model: Llama, tok: Tokenizer, plan: Plan, history: list[dict[str, float]]) -> None:
    """Write the Hugging Face directory and the run's history."""
    directory = MODELS / plan.name
    tokenizer.save(tok, directory, CONTEXT_TOKENS)
    save_file(model.checkpoint(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors lets the owner read only
    (directory / "config.json").write_text(json.dumps(plan.shape.config_json(), indent=2) + "\n")
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 0}, indent=2) + "\n"
    )
    (directory / "training_history.json").write_text(json.dumps(history) + "\n")


def load(plan: Plan) -> Llama:
    """The exported model, in fp32."""
    return load_directory(MODELS / plan.name, plan.shape)


def load_directory(directory: Path, shape: Shape) -> Llama:
    """A model that `export` has written, in fp32."""
    model = Llama(shape)
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: build/train-demo.pt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = args.checkpoint or MODELS.parent / "build" / f"train-{DEMO.name}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    data = corpus.read()
    if not (MODELS / "demo" / "tokenizer.json").exists():
        tokenizer.save(tokenizer.train(data.trained(), VOCAB_SIZE), MODELS / "demo", CONTEXT_TOKENS)
    tok = Tokenizer.from_file(str(MODELS / "demo" / "tokenizer.json"))
    training = run(DEMO, tok, data, checkpoint)
    export(training.model, tok, DEMO, training.history)


if __name__ == "__main__":
    main()
