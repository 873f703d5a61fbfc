"""The options of `make bench` that say which peers are there and how they are compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.peers.comparison import Comparison
from bench.peers.models import MODELS, default_folder
from bench.peers.ours import OurOptions
from bench.peers.processes import PEERS
from workers.config import DTYPES


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add them as a group."""
    group = parser.add_argument_group("peers")
    group.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"a peer's interpreter, or a command that ends with it; of {', '.join(PEERS)}; others are not measured",
    )
    group.add_argument("--rounds", type=_positive, default=2, help="turns of each engine on each model")
    group.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of our cluster; peers compute in bfloat16")
    group.add_argument("--threads", type=_positive, default=2, help="that each engine computes with")
    group.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a key of our cluster")
    group.add_argument(
        "--models-dir",
        type=Path,
        default=default_folder(),
        help="models and what peers make of them are kept here; default: %(default)s",
    )


def comparison_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Comparison:
    """What the options ask for; ends the program when a peer is not known."""
    interpreters = {}
    for entry in args.peer:
        name, is_there, python = entry.partition("=")
        if name not in PEERS or not (is_there and python):
            parser.error(f"--peer {entry}: NAME=PYTHON, with a NAME of {', '.join(PEERS)}")
        interpreters[name] = python
    return Comparison(
        interpreters=interpreters,
        folder=args.models_dir.absolute(),
        models=args.models,
        num_rounds=args.rounds,
        ours=OurOptions(args.dtype, args.threads, args.set),
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
