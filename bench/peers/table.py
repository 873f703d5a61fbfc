"""The peer table in Markdown, from rows as they were recorded.

    python -m bench.peers.table                        # of the newest run in bench/results/cpu.jsonl
    python -m bench.peers.table FILE                   # of the newest run in another file of rows

Knows nothing of how the rows were measured. A figure that is not in the rows is a dash.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.workload import QUANTITIES, Quantity
from bench.rows import RESULTS

_OURS = "switchyard"
_STEP = "peers.decode_step"
_IN_CLUSTER = {
    "peers.token_in_cluster": "token, times the engine alone",
    "peers.ttft_in_cluster": "TTFT, times the engine alone",
}
_OF_THE_CLUSTER = (_STEP, *_IN_CLUSTER)
_PARTS = {
    "model": "model",
    "sampling": "sampling",
    "scheduling": "scheduling",
    "slower_in_cluster": "the step is slower in the cluster by",
    "transport": "transport",
}

Row = Mapping[str, Any]


def ratio_to_best(quantity: Quantity, figure: float, peers: Sequence[float]) -> float:
    """More than 1 means better than the best peer."""
    return figure / max(peers) if quantity.more_is_better else min(peers) / figure


def newest_run(path: Path) -> list[Row]:
    """The rows that the newest comparison appended to the file; they share a time."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [row for row in rows if row["name"].startswith("peers.")]
    return [row for row in found if row["time"] == found[-1]["time"]]


def markdown(rows: Sequence[Row]) -> str:
    """A table of each model, who was not measured, and the profile of a decode step."""
    if not rows:
        return "No peers were compared.\n"
    last = rows[-1]
    parts = [f"Command `{last['command']}`, commit {last['commit']}, hardware {last['hardware']}. Medians."]
    for model in dict.fromkeys(row["setting"]["model"] for row in rows):
        of_model = [row for row in rows if row["setting"]["model"] == model]
        parts.append(_model_table(model, of_model))
        parts += _not_measured(of_model)
    parts += _steps([row for row in rows if row["name"] in _OF_THE_CLUSTER])
    return "\n\n".join(parts) + "\n"


def _model_table(model: str, rows: Sequence[Row]) -> str:
    quantities = [q for q in QUANTITIES.values() if any(row["name"] == f"peers.{q.name}" for row in rows)]
    lines = [_line([model, *(quantity.title for quantity in quantities)]), _line(["---"] * (1 + len(quantities)))]
    engines = dict.fromkeys(row["setting"]["engine"] for row in rows if row["name"] not in _OF_THE_CLUSTER)
    for engine in sorted(engines, key=lambda name: name != _OURS):
        cells = [_cell(q, _median(rows, f"peers.{q.name}", engine)) for q in quantities]
        lines.append(_line([_with_version(rows, engine), *cells]))
    ratios = [_median(rows, f"peers.{q.name}.ratio", _OURS) for q in quantities]
    lines.append(_line(["ours / best", *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _median(rows: Sequence[Row], name: str, engine: str) -> float | None:
    found = [row["median"] for row in rows if row["name"] == name and row["setting"]["engine"] == engine]
    return found[0] if found else None


def _cell(quantity: Quantity, figure: float | None) -> str:
    if figure is None:
        return "-"
    if quantity.unit == "s":
        return f"{figure:.2f} s" if figure >= 1 else f"{1000 * figure:.3g} ms"
    return f"{figure:,.0f} {quantity.unit}" if figure >= 100 else f"{figure:.1f} {quantity.unit}"


def _with_version(rows: Sequence[Row], engine: str) -> str:
    setting = next(row["setting"] for row in rows if row["setting"]["engine"] == engine)
    version = str(setting.get("version", "")).partition("-")[0]
    return f"{engine} {version} ({setting['dtype']})".replace("  ", " ")


def _not_measured(rows: Sequence[Row]) -> list[str]:
    missing: Mapping[str, str] = next(
        (row["setting"]["not_measured"] for row in rows if "not_measured" in row["setting"]), {}
    )
    return ["Not measured: " + "; ".join(f"{name}: {reason}" for name, reason in missing.items())] if missing else []


def _steps(rows: Sequence[Row]) -> list[str]:
    """Rows of the same models, of three names."""
    if not rows:
        return []
    titles = ["a token of one stream", *_PARTS.values(), "at the client", *_IN_CLUSTER.values()]
    lines = [_line(titles), _line(["---"] * len(titles))]
    medians = {(row["setting"]["model"], row["name"]): row["median"] for row in rows}
    for row in rows:
        if row["name"] != _STEP:
            continue
        model = row["setting"]["model"]
        ratios = [medians.get((model, name)) for name in _IN_CLUSTER]  # rows of old runs have none
        cells = [f"{row['beside'][part]:.2f} ms" for part in _PARTS]
        cells += [f"{row['median']:.2f} ms", *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]
        lines.append(_line([model, *cells]))
    return ["\n".join(lines)]


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cpu.jsonl"
    print(markdown(newest_run(path)), end="")


if __name__ == "__main__":
    main()
