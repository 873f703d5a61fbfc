"""Requests as a load generator or a simulator sees them: when they come and how long they are.

Reads the public formats (Azure LLM inference CSV, Mooncake JSON lines) and makes synthetic ones.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class TraceError(Exception):
    """A trace or a spec that cannot be read; the message names the file and line, or the key."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Requests with the same prefix_id start with the same tokens."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_id: int = -1  # -1: shares nothing


# Column names of the formats seen in the wild, first match wins.
_ARRIVAL = ("t_s", "arrived_at", "TIMESTAMP")
_PROMPT = ("in_tokens", "num_prefill_tokens", "ContextTokens")
_OUTPUT = ("out_tokens", "num_decode_tokens", "GeneratedTokens")


def load_trace(path: Path) -> list[TraceRequest]:
    """Read a .csv or .jsonl trace, in order of arrival. Raises TraceError naming the file and the line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = _csv_rows(file) if path.suffix == ".csv" else _jsonl_rows(file)
            return sorted(_numbered(rows, path), key=lambda r: r.arrival_s)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None


def _numbered(rows: Iterator[TraceRequest], path: Path) -> Iterator[TraceRequest]:
    number = 0
    while True:
        number += 1
        try:
            row = next(rows, None)
        except (KeyError, ValueError, TypeError) as error:
            raise TraceError(f"{path}: request {number}: {error}") from None
        if row is None:
            return
        yield row


def _csv_rows(file: Iterator[str]) -> Iterator[TraceRequest]:
    for row in csv.DictReader(file):
        yield TraceRequest(
            float(_first(row, _ARRIVAL)), int(float(_first(row, _PROMPT))), int(float(_first(row, _OUTPUT)))
        )


def _first(row: dict[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if row.get(name):
            return row[name]
    raise KeyError(f"none of the columns {', '.join(names)}")


def _jsonl_rows(file: Iterator[str]) -> Iterator[TraceRequest]:
    for line in file:
        if line.strip():
            row = json.loads(line)
            hashes = row.get("hash_ids") or [-1]
            yield TraceRequest(
                float(row["timestamp"]) / 1000.0, int(row["input_length"]), int(row["output_length"]), int(hashes[0])
            )


def synthetic_trace(spec: str) -> list[TraceRequest]:
    """ "requests=32,prompt=200,output=64,rate=4" -> that many requests, rate per second (0: all at once)."""
    values: dict[str, float] = {"requests": 32, "prompt": 128, "output": 64, "rate": 0}
    for part in filter(None, spec.split(",")):
        key, separator, value = part.partition("=")
        if key not in values or not separator:
            raise TraceError(f"--synthetic: {part!r} is not one of {', '.join(values)}=NUMBER")
        try:
            values[key] = float(value)
        except ValueError:
            raise TraceError(f"--synthetic: {key} must be a number, not {value!r}") from None
        if values[key] < 0 or (values[key] == 0 and key != "rate"):
            raise TraceError(f"--synthetic: {key} must be positive, not {value}")
    gap_s = 1.0 / values["rate"] if values["rate"] else 0.0
    return [
        TraceRequest(i * gap_s, int(values["prompt"]), int(values["output"])) for i in range(int(values["requests"]))
    ]
