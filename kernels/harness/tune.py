"""Looks for better launch configurations on a CUDA device and writes them to `kernels/configs`.

    python -m kernels.harness.tune                    # every operation that has a table, all full cases
    python -m kernels.harness.tune --only "moe bf16 1 "  # the cases whose name holds the words
    python -m kernels.harness.tune --list             # what would be tried first; needs no GPU

From the configuration in use it takes the best step to a neighbour (one size halved or doubled, a stage more or less),
and again from there while that helps. A configuration that does not compile, does not fit or is wrong is passed over.
A table is written after each case, so that a run may be stopped. Knows nothing of any operation.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kernels import tuning
from kernels.harness import OPS
from kernels.harness.compare import case_error
from kernels.harness.timing import num_sets_for, seconds
from kernels.op import Case, Op

Config = Mapping[str, int]
_SMALLEST_GAIN = 1.02  # less is noise
_MAX_STEPS = 4
_LIMITS = {
    "num_warps": (4, 8),
    "num_stages": (2, 8),
    "shares": (1, 16),
    "programs_per_sm": (1, 4),
    "block_m": (8, 256),
}
_OTHER_LIMITS = (32, 256)  # of the remaining block sizes


def neighbours(config: Config) -> list[dict[str, int]]:
    """All configurations one step away."""
    found = []
    for name, value in config.items():
        least, most = _LIMITS.get(name, _OTHER_LIMITS)
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [{**config, name: step} for step in steps if least <= step <= most]
    return found


def with_row(rows: list[dict[str, Any]], shape: Mapping[str, int], config: Config, source: str) -> list[dict[str, Any]]:
    """The table with this shape's row replaced, or added behind the others."""
    row = {"shape": dict(shape), "config": dict(config), "from": source}
    if all(other["shape"] != shape for other in rows):
        return [*rows, row]
    return [row if other["shape"] == shape else other for other in rows]


def tunable(only: str) -> Iterator[tuple[Op[..., Any], Case]]:
    for op in OPS:
        for case in op.full if table_path(op.name).exists() else ():
            if only in f"{op.name} {case.name}" and case.dtype != torch.float32:
                yield op, case


def table_path(op_name: str) -> Path:
    return Path(tuning.__file__).with_name("configs") / f"{op_name}.json"


def write_table(op_name: str, rows: list[dict[str, Any]]) -> None:
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    table_path(op_name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def current(op: Op[..., Any], case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """The shape that the launcher asks the table for, and what it gets. Nothing is launched or compiled."""

    class Asked(Exception):
        pass

    def ask(name: str, shape: dict[str, int]) -> Config:
        raise Asked(name, shape)

    try:
        with tuning.answered_by(ask):
            op.launch(*case.build("meta"))
    except Asked as asked:
        name, shape = asked.args
        return shape, dict(tuning.config_for(name, **shape))
    raise ValueError(f"{op.name} {case.name} asks no table")


def time_s(op: Op[..., Any], sets: list[tuple[Any, ...]], config: Config) -> float:
    """Infinite where it cannot be launched."""
    with tuning.answered_by(lambda name, shape: config):
        try:
            return seconds([lambda arguments=arguments: op.launch(*arguments) for arguments in sets], "cuda")  # type: ignore[misc]
        except Exception as error:  # too much shared memory, a tile that the compiler does not take
            print(f"    {dict(config)}: {type(error).__name__}")
            return math.inf


def is_right(op: Op[..., Any], case: Case, config: Config) -> bool:
    with tuning.answered_by(lambda name, shape: config):
        return case_error(op, case, op.launch, "cuda") <= op.tolerance[case.dtype]


def tune(op: Op[..., Any], case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """The case's shape and the best configuration found for it."""
    shape, best = current(op, case)
    first = case.build("cuda")
    num_sets = num_sets_for(op.cost(*first).memory_bytes, "cuda")
    sets = [first] + [case.build("cuda") for _ in range(num_sets - 1)]
    began_s = best_s = time_s(op, sets, best)
    for _ in range(_MAX_STEPS):
        tried = sorted((time_s(op, sets, config), i, config) for i, config in enumerate(neighbours(best)))
        took_s, _, config = next(
            (t for t in tried if t[0] * _SMALLEST_GAIN > best_s or is_right(op, case, t[2])), (math.inf, 0, best)
        )
        if took_s * _SMALLEST_GAIN > best_s:
            break
        best, best_s = config, took_s
    print(f"{op.name} {case.name}: {began_s * 1e6:.1f} -> {best_s * 1e6:.1f} us  {best}", flush=True)
    return shape, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        for op, case in tunable(options.only):
            shape, config = current(op, case)
            print(f"{op.name} {case.name}: {shape} {config}, {len(neighbours(config))} neighbours")
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device; --list needs none")
    source = torch.cuda.get_device_name()
    with torch.inference_mode():
        for op, case in tunable(options.only):
            shape, config = tune(op, case)
            rows = json.loads(table_path(op.name).read_text(encoding="utf-8"))
            write_table(op.name, with_row(rows, shape, config, source))


if __name__ == "__main__":
    main()
