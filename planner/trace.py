"""Requests as a load generator or a simulator sees them: when they come and how long they are.

Reads the public formats (Azure LLM inference CSV, Mooncake JSON lines) and makes synthetic ones.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO


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
    """Read a .csv or .jsonl trace, compressed if its name ends in .gz, in order of arrival.

    Raises TraceError naming the file and the line.
    """
    try:
        with _open(path) as file:
            rows = _csv_rows(file) if ".csv" in path.suffixes else _jsonl_rows(file)
            return sorted(_numbered(rows, path), key=lambda r: r.arrival_s)
    except (OSError, EOFError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


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
    start: datetime | None = None
    for row in csv.DictReader(file):
        said = _first(row, _ARRIVAL)
        if "-" in said:  # a date and a time, with seven digits of a second: the first request arrives at 0
            whole, _, fraction = said.partition(".")
            moment = datetime.fromisoformat(whole)
            start = start or moment
            arrival_s = (moment - start).total_seconds() + float(f"0.{fraction or 0}")
        else:
            arrival_s = float(said)
        yield TraceRequest(arrival_s, int(float(_first(row, _PROMPT))), int(float(_first(row, _OUTPUT))))


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
