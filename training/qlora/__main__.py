"""Fine-tunes a LoRA adapter on a base in NF4: `python -m training.qlora MODEL TEXT... --out DIR`.

The base's matrices are held in 4 bits with double quantization (QLoRA, arXiv:2305.14314) and never change; the adapter
is written in PEFT's layout. A run that was cut off goes on with the same command. Knows nothing of serving.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from checkpoint.errors import CheckpointError
from checkpoint.tensors import weights_digest
from training.qlora import adapter, data, run
from training.qlora.adapter import TARGETS, LoraOptions
from training.qlora.data import DataError, Rows
from training.qlora.model import AdaptedModel, open_model
from workers.config import resolve_model
from workers.errors import ModelError

_MOST_RANK = 512


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _rank(text: str) -> int:
    value = _positive(text)
    if value > _MOST_RANK:
        raise argparse.ArgumentTypeError(f"{value} is more than {_MOST_RANK}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.qlora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a directory, or the name of a packaged model: dense, Llama's or Qwen 3's layers")
    parser.add_argument("texts", type=Path, nargs="+", help="files, or folders of files, in UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's directory, which is not there yet")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="texts to measure the perplexity on")
    parser.add_argument("--rank", type=_rank, default=8)
    parser.add_argument("--alpha", type=_above_zero, default=16.0, help="the adapter counts alpha / rank times")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--steps", type=_positive, default=100)
    parser.add_argument("--batch", type=_positive, default=4, help="rows of a step")
    parser.add_argument("--length", type=_positive, default=512, help="tokens of a row")
    parser.add_argument("--lr", type=_above_zero, default=2e-3, help="the largest learning rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of a step's products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: beside --out, with .pt behind its name")
    return parser


def _rows(args: argparse.Namespace, directory: Path, model: AdaptedModel) -> Rows:
    most = model.config.max_position_embeddings
    if args.length > most:
        raise DataError(f"--length: {args.length} is more than the model's {most} positions")
    texts = data.read_texts(args.texts, "texts")
    measured = data.read_texts(args.held_out, "--held-out") if args.held_out else []
    tok = data.tokenizer_of(directory)
    end_id = model.config.eos_token_ids[0] if model.config.eos_token_ids else None
    train = data.rows_of(tok, texts, end_id, args.length, "texts")
    held_out = torch.zeros(0, args.length + 1, dtype=torch.int64)
    if measured:
        held_out = data.rows_of(tok, measured, end_id, args.length, "--held-out")
    largest = int(torch.cat([train, held_out]).max())
    if largest >= model.config.vocab_size:
        raise DataError(f"model: its tokenizer has the token {largest}, its vocab_size is {model.config.vocab_size}")
    return Rows(train, held_out)


def _train(args: argparse.Namespace) -> None:
    directory = resolve_model(args.model)
    options = LoraOptions(args.rank, args.alpha, tuple(name for name in TARGETS if name in args.targets))
    model = open_model(directory, options, is_quantized=True, seed=args.seed)
    rows = _rows(args, directory, model)
    plan = run.Plan(options, args.steps, args.batch, args.lr, args.seed, args.dtype == "bfloat16")
    training = run.Training(plan, model, rows, weights_digest(directory))
    checkpoint = args.checkpoint or args.out.with_name(args.out.name + ".pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        training.resume(checkpoint)
    training.run(checkpoint)
    report: dict[str, object] = {"history": training.history}
    if len(rows.held_out):
        report["held_out"] = _measured(directory, model, rows)
    _write(args, model, options, report)


def _measured(directory: Path, trained: AdaptedModel, rows: Rows) -> dict[str, float]:
    """Perplexities on the held-out rows, of the base in 4 bits and as it is, without and with the adapter."""
    trained.round_adapter()
    found = {"with_adapter_nf4": run.perplexity(trained, rows.held_out)}
    for kind, is_quantized in (("nf4", True), ("plain", False)):
        base = open_model(directory, None, is_quantized)
        found[f"base_{kind}"] = run.perplexity(base, rows.held_out)
    plain = open_model(directory, trained.options, is_quantized=False)
    plain.load_state_dict(trained.state_dict())
    plain.merge()
    found["with_adapter_plain"] = run.perplexity(plain, rows.held_out)
    return found


def _write(args: argparse.Namespace, model: AdaptedModel, options: LoraOptions, report: dict[str, object]) -> None:
    """Under the final name when it is whole."""
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    adapter.write(model.pairs, options, args.model, unfinished)
    (unfinished / "training_history.json").write_text(json.dumps(report) + "\n")
    unfinished.rename(args.out)
    for name, value in dict(report.get("held_out", {})).items():  # type: ignore[call-overload]
        print(f"perplexity {name}: {value:.3f}")
    print(args.out)


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} is there already")
    torch.set_num_threads(args.threads)
    try:
        _train(args)
    except (DataError, ModelError, CheckpointError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
