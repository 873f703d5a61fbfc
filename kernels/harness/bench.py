"""Checks and times every operation at production shapes, beside the device's own ceilings and other implementations.

    python -m kernels.harness.bench --out DIR             # on a CUDA device; rows are appended to DIR/kernels.jsonl
    python -m kernels.harness.bench --device cpu --out DIR  # a rehearsal: the same code over the small cases

A case whose row is in DIR or in --known already, made from the same source by the same toolchain on the same kind of
device, is passed over, so that a second run spends its minutes on what changed. Exits 1 when a result was wrong or a
case failed to run. Knows nothing of any operation.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.harness import OPS
from kernels.harness.compare import case_error
from kernels.harness.peers import PEERS
from kernels.harness.timing import Ceilings, measure_ceilings, num_sets_for, seconds
from kernels.op import Case, Op

FILE_NAME = "kernels.jsonl"
_ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def fingerprint(one: Op[..., Any], case: Case, device_name: str) -> str:
    """Of all a row depends on: the operation's file, what it imports of ours, its table, case, toolchain, device."""
    digest = hashlib.sha256()
    paths = _sources(Path(inspect.getsourcefile(one.reference) or ""), set())
    table = _ROOT / "kernels" / "configs" / f"{one.name}.json"
    for path in sorted(paths | ({table} if table.exists() else set())):
        digest.update(path.read_bytes())
    for word in (one.name, case.name, torch.__version__, triton.__version__, device_name):
        digest.update(b"\0" + word.encode())
    return digest.hexdigest()[:16]


def _sources(path: Path, found: set[Path]) -> set[Path]:
    """The file, the files of this package that it imports, and so on."""
    if path in found or not path.exists():
        return found
    found.add(path)
    for module in re.findall(r"^from (kernels[\w.]*) import", path.read_text(encoding="utf-8"), re.MULTILINE):
        _sources(_ROOT.joinpath(*module.split(".")).with_suffix(".py"), found)
    return found


def bench_case(one: Op[..., Any], case: Case, device: str, ceilings: Ceilings) -> Row:
    """Compare with the definition, then time ours and the peers."""
    run = one.launch if device == "cuda" else one.cpu
    row: Row = {"error": case_error(one, case, run, device), "tolerance": one.tolerance[case.dtype]}
    first = case.build(device)
    cost = one.cost(*first)
    sets = [first] + [case.build(device) for _ in range(num_sets_for(cost.memory_bytes, device) - 1)]
    took_s = seconds([lambda arguments=arguments: run(*arguments) for arguments in sets], device)  # type: ignore[misc]
    row |= {
        "us": took_s * 1e6,
        "bytes_per_s": cost.memory_bytes / took_s,
        "flops_per_s": cost.flops / took_s,
        "share_of_ceiling": ceilings.floor_s(cost.memory_bytes, cost.flops) / took_s,
    }
    row["peers_us"] = {}
    for name, peer in PEERS.get(one.name, {}).items():
        calls = [peer(*arguments) for arguments in sets]
        if all(call is not None for call in calls):
            row["peers_us"][name] = seconds([call for call in calls if call is not None], device) * 1e6
    return row


def selected(device: str, only: str) -> Iterator[tuple[Op[..., Any], Case]]:
    """On a GPU the production shapes in the dtypes that are served there; on the CPU the small cases."""
    for one in OPS:
        for case in one.full if device == "cuda" else one.small:
            if only in f"{one.name} {case.name}" and (device == "cpu" or case.dtype != torch.float32):
                yield one, case


def known_rows(paths: list[Path]) -> dict[str, Row]:
    """Rows of earlier runs that were right, by fingerprint."""
    rows = [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]
    return {row["fingerprint"]: row for row in rows if "fingerprint" in row and "failure" not in row}


def table(rows: list[Row]) -> str:
    """Markdown, a line per row."""
    lines = [
        "| op | case | us | TB/s | TFLOP/s | of the ceiling | peers (us) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['op']} | {row['case']} | failed: {row['failure']} | | | | |")
            continue
        peers = ", ".join(f"{name} {us:.1f}" for name, us in row["peers_us"].items())
        lines.append(
            f"| {row['op']} | {row['case']} | {row['us']:.1f} | {row['bytes_per_s'] / 1e12:.2f} |"
            f" {row['flops_per_s'] / 1e12:.1f} | {row['share_of_ceiling']:.0%} | {peers} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--known", type=Path, action="append", default=[], help="a folder of committed results")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--minutes", type=float, default=6.0, help="no case begins later than this")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu rehearses")
    torch.set_num_threads(2 if options.device == "cpu" else torch.get_num_threads())
    began_s = time.monotonic()
    ceilings = measure_ceilings(options.device)
    print(f"{ceilings.device}: copy {ceilings.copy_bytes_per_s / 1e12:.3f} TB/s, "
          f"GEMM {ceilings.gemm_flops_per_s / 1e12:.2f} TFLOP/s")  # fmt: skip
    path = options.out / FILE_NAME
    known = known_rows([path, *(folder / FILE_NAME for folder in options.known)])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, is_good = [], True
    with path.open("a", encoding="utf-8") as out, torch.inference_mode():
        for one, case in selected(options.device, options.only):
            mark = fingerprint(one, case, ceilings.device)
            if mark in known:
                rows.append(known[mark])
                continue
            if time.monotonic() - began_s > 60 * options.minutes:
                print(f"left out for want of time: {one.name} {case.name}")
                continue
            row: Row = {"op": one.name, "case": case.name, "fingerprint": mark, "ceilings": asdict(ceilings)}
            try:
                row |= bench_case(one, case, options.device, ceilings)
                is_right = row["error"] <= row["tolerance"]
                if not is_right:
                    row["failure"] = f"error {row['error']:.2g}, allowed {row['tolerance']:.2g}"
            except Exception as error:  # whatever a compiler or a launch throws is this case's result
                row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            is_good &= "failure" not in row
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
    print(table(rows))
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
