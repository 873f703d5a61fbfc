"""The static table of all kernels, in Markdown: what the compiler made for sm_90a, and what limits each operation.

    python -m kernels.harness.static_table PAPER_LANE.jsonl > kernels/STATIC.md

Made from the paper lane's records, so that it needs no GPU and is the same wherever it is made. Knows nothing of any
operation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from kernels.harness import OPS

_HEAD = """# Kernels on paper

What the compiler makes of each kernel at production shapes for sm_90a, and what limits each operation there. An SM of
an H200 needs about 29 KB in flight to keep its share of the memory busy; a column says how many its blocks can have
asked for at one time. No kernel spills. Nothing here was measured on a GPU.

`python -m kernels.harness.lanes paper > FILE` makes the records and `python -m kernels.harness.static_table FILE` makes
this page of them.
"""
_COLUMNS = (
    "case", "kernel", "warps", "stages", "registers", "shared bytes", "blocks per SM", "KB in flight", "spilled bytes",
    "SASS",
)  # fmt: skip


def render(records: Iterable[Mapping[str, Any]]) -> str:
    """The page. Records are those of the paper lane, one per case."""
    by_op: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_op.setdefault(record["op"], []).append(record)
    parts = [_HEAD]
    for op in OPS:
        lines = [f"## {op.name}", "", op.limit, "", f"| {' | '.join(_COLUMNS)} |", "| --- " * len(_COLUMNS) + "|"]
        for record in by_op.get(op.name, []):
            lines += [_line(record["case"], kernel) for kernel in record["kernels"]]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(case: str, kernel: Mapping[str, Any]) -> str:
    sass = ", ".join(f"{name} {count}" for name, count in kernel["sass"].items())
    return (
        f"| {case} | `{kernel['name']}` | {kernel['num_warps']} | {kernel['num_stages']} | {kernel['registers']} |"
        f" {kernel['shared_bytes']} | {kernel['blocks_per_sm']} | {kernel['bytes_in_flight'] / 1000:.0f} |"
        f" {kernel['local_bytes']} | {sass} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=argparse.FileType(encoding="utf-8"), help="what the paper lane printed")
    records = [json.loads(line) for line in parser.parse_args().records]
    sys.stdout.write(render(records))


if __name__ == "__main__":
    main()
