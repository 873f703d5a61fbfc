"""What the Helm chart has of the code: `values.schema.json` and the table of values in its README.

`python -m deploy.chart schema > helm/switchyard/values.schema.json`; `python -m deploy.chart readme` changes the table
in place. Knows nothing of templates.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deploy.config import ROOT, ClusterConfig
from settings.docs import json_schema

CHART = ROOT / "helm" / "switchyard"
BASE = ROOT / "helm" / "values.schema.yaml"
BEGIN, END = "<!-- values:begin -->", "<!-- values:end -->"
_CLUSTER = (
    "The whole configuration of the cluster (`docs/configuration.md`), printed as it is. Some keys are the chart's."
)


def schema() -> dict[str, Any]:
    """The chart's JSON schema (draft 7): the part written by hand, and `cluster` from the dataclasses."""
    made: dict[str, Any] = yaml.safe_load(BASE.read_text())
    cluster = json.loads(json.dumps(json_schema(ClusterConfig)).replace("#/$defs/", "#/definitions/"))
    made["definitions"] |= cluster.pop("$defs")
    made["properties"]["cluster"] = {**cluster, "description": _CLUSTER}
    return _with_defaults_required(made, made, values())


def _with_defaults_required(whole: dict[str, Any], declared: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Every value with a default must be there: null takes it away, and templates would fail on what it held."""
    target = _resolved(whole, declared)
    if "properties" not in target or not given:
        return declared
    properties = {
        key: _with_defaults_required(whole, below, given[key])
        if key != "cluster" and isinstance(given.get(key), dict)
        else below
        for key, below in target["properties"].items()
    }
    own = {key: value for key, value in declared.items() if key != "$ref"}  # draft 7 reads nothing beside a $ref
    return {**target, **own, "required": list(given), "properties": properties}


def values() -> dict[str, Any]:
    """The chart's default values."""
    read: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return read


def table() -> str:
    """All values in Markdown: key, default and meaning."""
    rows = ["| value | default | meaning |", "| --- | --- | --- |"]
    for path, default, text in _leaves(schema(), schema()["properties"], values(), ""):
        rows.append(f"| `{path}` | `{json.dumps(default)}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def _leaves(whole: dict[str, Any], known: dict[str, Any], given: Any, above: str) -> Iterator[tuple[str, Any, str]]:
    """Path, default and meaning of each value that holds no further named ones; `cluster` counts as one."""
    for key, value in given.items():
        declared = known[key]
        target = _resolved(whole, declared)
        path = f"{above}{key}"
        text = declared.get("description") or target.get("description", "")
        below = target.get("properties")
        if below is None or key in ("cluster", "resources") or not value:
            yield path, value, text
        else:
            for leaf_path, default, meaning in _leaves(whole, below, value, f"{path}."):
                yield leaf_path, default, f"{text} {meaning}" if text else meaning


def _resolved(whole: dict[str, Any], declared: dict[str, Any]) -> dict[str, Any]:
    reference = declared.get("$ref")
    if reference is None:
        return declared
    found: dict[str, Any] = whole["definitions"][reference.removeprefix("#/definitions/")]
    return found


def with_table(readme: str) -> str:
    """The chart's README with a fresh table."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Prints the schema, or renews the table."""
    if arguments == ["schema"]:
        sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
    elif arguments == ["readme"]:
        path: Path = CHART / "README.md"
        path.write_text(with_table(path.read_text()))
    else:
        sys.stderr.write("usage: python -m deploy.chart schema|readme\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
