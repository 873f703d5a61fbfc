"""Checks and times every operation at production shapes, beside the device's own ceilings and other implementations.

    python -m kernels.harness.bench --out DIR               # on a CUDA device; rows are appended to DIR/kernels.jsonl
    python -m kernels.harness.bench --device cpu --out DIR  # a rehearsal: the same code over the small cases
    python -m kernels.harness.bench --table DIR             # no run: DIR's newest row of each case, as Markdown

Cases with a target come first, every operation's first one before any operation's second, so that a run that is cut
short has something of everything. A case whose row is in DIR or in --known already, made from the same source by the
same toolchain on the same kind of device, is passed over, so that a second run spends its minutes on what changed.
Exits 1 when a result was wrong or a case failed to run. Knows nothing of any operation.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import re
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.harness import OPS
from kernels.harness.compare import case_error
from kernels.harness.peers import PEERS
from kernels.harness.timing import Ceilings, measure_ceilings, num_sets_for, seconds
from kernels.op import Case, Op, Target

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
    """The file, the files of kernels and costs that it imports, and so on."""
    if path in found or not path.exists():
        return found
    found.add(path)
    imports = re.findall(
        r"^from ((?:kernels|costs)[\w.]*) import (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    for module, name in imports:
        folder = _ROOT.joinpath(*module.split("."))
        _sources(folder.with_suffix(".py"), found)
        _sources(folder / f"{name}.py", found)
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
        "unit": cost.unit,
        "share_of_ceiling": ceilings.floor_s(cost.memory_bytes, cost.flops, cost.unit) / took_s,
    }
    row["peers_us"] = {}
    for name, peer in PEERS.get(one.name, {}).items():
        try:
            calls = [peer(*arguments) for arguments in sets]
            if all(call is not None for call in calls):
                row["peers_us"][name] = seconds([call for call in calls if call is not None], device) * 1e6
        except Exception as error:  # somebody else's code: our own figures stand without it
            row.setdefault("peer_failures", {})[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if case.target is not None:
        row |= {"target": describe(case.target), "reached": reached(case.target, row, ceilings)}
    return row


def describe(target: Target) -> str:
    """A target in words."""
    if target.of in ("us", "TFLOP/s"):
        return f"{'at most ' * (target.of == 'us')}{target.value:g} {target.of}"
    return f"{target.value:.0%} of the {'fastest peer' if target.of == 'peer' else target.of}"


def reached(target: Target, row: Row, ceilings: Ceilings) -> float | None:
    """The share of its target that a row comes to: it is met from 1 on. None where no peer is there to compare with."""
    if target.of == "us":
        return target.value / float(row["us"])
    if target.of == "peer":
        fastest_us = min(row["peers_us"].values(), default=None)
        return None if fastest_us is None else fastest_us / float(row["us"]) / target.value
    value = {
        "memory": row["bytes_per_s"] / ceilings.copy_bytes_per_s,
        "gemm": row["flops_per_s"] / ceilings.rate(row["unit"]),
        "TFLOP/s": row["flops_per_s"] / 1e12,
    }[target.of]
    return float(value) / target.value


def selected(device: str, only: str) -> list[tuple[Op[..., Any], Case]]:
    """What to run, in order: on a GPU the production shapes that are served there, on the CPU the small cases."""
    found = []
    for one in OPS:
        cases = [case for case in (one.full if device == "cuda" else one.small) if only in f"{one.name} {case.name}"]
        if device == "cuda":
            cases = [case for case in cases if case.dtype != torch.float32 or case.target is not None]
        cases.sort(key=lambda case: case.target is None)
        found += [(case.target is None, turn, one, case) for turn, case in enumerate(cases)]
    found.sort(key=lambda entry: entry[:2])
    return [(one, case) for _, _, one, case in found]


def read_rows(paths: list[Path]) -> list[Row]:
    """All rows of these files, in the order of writing; the last line of a run that was cut off may be half a row."""
    rows = []
    for line in (line for path in paths if path.exists() for line in path.read_text().splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def known_rows(paths: list[Path]) -> dict[str, Row]:
    """Rows of earlier runs that were right, by fingerprint."""
    return {row["fingerprint"]: row for row in read_rows(paths) if "fingerprint" in row and "failure" not in row}


def newest_rows(rows: list[Row]) -> list[Row]:
    """Of each operation's case on each kind of device the row that was written last."""
    return list({(row["ceilings"]["device"], row["op"], row["case"]): row for row in rows}.values())


def table(rows: list[Row]) -> str:
    """Markdown, a line per row, in the order of the operations; before it a line per device, with its ceilings."""
    order = {one.name: i for i, one in enumerate(OPS)}
    rows = sorted(rows, key=lambda row: order.get(row["op"], len(order)))
    lines = [*dict.fromkeys(_ceilings_line(row["ceilings"]) for row in reversed(rows) if "ceilings" in row)]
    lines += [
        "",
        "| op | case | us | TB/s | TFLOP/s | of the ceiling | target | met | peers (us) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['op']} | {row['case']} | failed: {row['failure']} | | | | | | |")
            continue
        peers = ", ".join(f"{name} {us:.1f}" for name, us in row["peers_us"].items())
        lines.append(
            f"| {row['op']} | {row['case']} | {row['us']:.1f} | {row['bytes_per_s'] / 1e12:.2f} |"
            f" {row['flops_per_s'] / 1e12:.1f} | {row['share_of_ceiling']:.0%} | {row.get('target', '')} |"
            f" {_is_met(row)} | {peers} |"
        )
    return "\n".join(lines)


def _is_met(row: Row) -> str:
    if "target" not in row:
        return ""
    if row["reached"] is None:
        return "no peer"
    return "yes" if row["reached"] >= 1 else f"no, {row['reached']:.0%} of it"


def _ceilings_line(ceilings: Row) -> str:
    words = f"{ceilings['device']}: copy {ceilings['copy_bytes_per_s'] / 1e12:.3f} TB/s"
    for name, field in (("GEMM", "gemm_flops_per_s"), ("fp8", "fp8_flops_per_s"), ("int8", "int8_ops_per_s")):
        if ceilings.get(field):
            words += f", {name} {ceilings[field] / 1e12:.2f} TFLOP/s"
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of a folder's rows, and run nothing")
    parser.add_argument("--known", type=Path, action="append", default=[], help="a folder of committed results")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--minutes", type=float, default=6.0, help="no case begins later than this")
    options = parser.parse_args()
    if options.table is not None:
        print(table(newest_rows(read_rows([options.table / FILE_NAME]))))
        return
    if options.out is None:
        parser.error("--out or --table")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu rehearses")
    torch.set_num_threads(2 if options.device == "cpu" else torch.get_num_threads())
    began_s = time.monotonic()
    ceilings = measure_ceilings(options.device)
    print(_ceilings_line(asdict(ceilings)))
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
            row["time"] = datetime.now(UTC).isoformat(timespec="seconds")
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
