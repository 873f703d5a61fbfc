"""Runs every operation's cases in one lane and prints one JSON line per case.

    TRITON_INTERPRET=1 python -m kernels.harness.lanes interpreter   # small cases, Triton code interpreted on the CPU
    python -m kernels.harness.lanes paper   # full cases, compiled for sm_90a on meta tensors; needs no GPU
    python -m kernels.harness.lanes gpu     # small and full cases on the CUDA device; --small leaves the full ones out

A lane is a process of its own, because Triton decides at import whether it interprets. Exits 1 when a case failed to
run or its result was wrong. `--only WORD` keeps the cases whose name holds the word.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.harness import OPS
from kernels.harness.compare import case_error
from kernels.op import Case, Op

Record = dict[str, Any]

_ROOT = Path(__file__).parents[2]
_SOURCES = ("kernels/**/*.py", "kernels/configs/*.json", "costs/**/*.py")  # costs has layouts that kernels share


@functools.cache
def sources_digest() -> str:
    """Of what decides what the paper lane compiles: code and tuned configurations, and Triton's version."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern)):
        digest.update(b"\0%s\0%s" % (path.relative_to(_ROOT).as_posix().encode(), path.read_bytes()))
    return digest.hexdigest()[:16]


def interpreter_lane(op: Op[..., Any], case: Case) -> Record:
    return {"error": case_error(op, case, op.launch, "cpu"), "tolerance": op.tolerance[case.dtype]}


def paper_lane(op: Op[..., Any], case: Case) -> Record:
    from kernels.harness.paper import compile_only, describe

    with compile_only() as made:
        op.launch(*case.build("meta"))
    return {"sources": sources_digest(), "kernels": [dataclasses.asdict(describe(compiled)) for compiled in made]}


def gpu_lane(op: Op[..., Any], case: Case) -> Record:
    return {"error": case_error(op, case, op.launch, "cuda"), "tolerance": op.tolerance[case.dtype]}


LANES: dict[str, tuple[Callable[[Op[..., Any], Case], Record], Callable[[Op[..., Any]], Iterable[Case]]]] = {
    "interpreter": (interpreter_lane, lambda op: op.small),
    "paper": (paper_lane, lambda op: op.full),
    "gpu": (gpu_lane, lambda op: op.small + op.full),
}


def _prepare(lane: str) -> None:
    torch.set_num_threads(1)
    interpreting = bool(triton.knobs.runtime.interpret)
    if interpreting != (lane == "interpreter"):
        sys.exit(f"the {lane} lane needs TRITON_INTERPRET={int(lane == 'interpreter')} in the environment")
    if lane == "gpu" and not torch.cuda.is_available():
        sys.exit("the gpu lane needs a CUDA device")
    if interpreting:
        from kernels.harness.interpret import repair

        repair()


def _part(text: str) -> tuple[int, int]:
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit() and int(first) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I < N")
    return int(first), int(of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lane", choices=LANES)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument(
        "--small", action="store_true", help="without production shapes, which the benchmark checks too"
    )
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="every N-th operation from the I-th on, from 0"
    )
    parser.add_argument("--first", action="store_true", help="of each operation only the first case")
    options = parser.parse_args()
    _prepare(options.lane)
    run, cases = LANES[options.lane]
    failed = False
    first, step = options.part
    for op in OPS[first::step]:
        for case in list(cases(op))[: 1 if options.first else None]:
            if options.only not in f"{op.name} {case.name}" or (options.small and case not in op.small):
                continue
            record: Record = {"op": op.name, "case": case.name}
            try:
                with torch.inference_mode():
                    record |= run(op, case)
                failed |= "error" in record and not record["error"] <= record["tolerance"]
            except (
                Exception
            ) as error:  # whatever a compiler or a launch throws is this case's result; the others still run
                failed = True
                record["failure"] = f"{type(error).__name__}: {error}"
            print(json.dumps(record), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
