"""What fields mean, as documents and the schema show it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema
import pytest
import yaml

from deploy import reference
from deploy.actors.kv_nodes import KVNodeSettings
from deploy.config import ROOT, ClusterConfig
from kvstore.config import NodeSpec
from router.config import RouterSpec
from settings.docs import branches, field_docs, json_schema, table
from workers.config import WorkerSpec

EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    num_steps: int | None = None
    """Steps | more."""


@dataclass(frozen=True, slots=True)
class Child(Base):
    folder: Path
    """A folder of
    two lines."""
    names: tuple[str, ...] = ("a",)
    """Names."""
    sizes: dict[str, float] = field(default_factory=dict)
    """Sizes."""


@dataclass(frozen=True, slots=True)
class Silent:
    number: int = 0


def test_a_table_has_what_is_required_first_and_bases_last() -> None:
    assert table(Child).splitlines()[2:] == [
        "| `folder` | path | required | A folder of two lines. |",
        '| `names` | list of text | `["a"]` | Names. |',
        "| `sizes` | number by name | `{}` | Sizes. |",
        "| `num_steps` | integer, null | `null` | Steps \\| more. |",
    ]


def test_a_field_without_a_text_is_an_error() -> None:
    with pytest.raises(KeyError, match="number"):
        field_docs(Silent)


@pytest.mark.parametrize("root", [ClusterConfig, RouterSpec, WorkerSpec, NodeSpec], ids=lambda cls: cls.__name__)
def test_every_field_has_a_text(root: type) -> None:
    for cls in branches(root):
        assert all(text.endswith((".", ")")) for text in field_docs(cls).values()), cls


def test_the_document_is_fresh() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == reference.render(), "run python -m deploy.reference > docs/configuration.md"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_by_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema(ClusterConfig))


def test_the_schema_refuses_what_the_loader_refuses() -> None:
    schema = json_schema(ClusterConfig)
    json.dumps(schema)
    assert (
        schema["$defs"]["PoolConfig"]["properties"]["max_num_seqs"]["description"]
        == "Most requests in a running batch."
    )
    for wrong in ({"pool": {}}, {"pools": {"a": {"role": "mixed", "block_size": 16}}}, {"kvstore": {"peers": "yes"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_secrets_are_in_no_repr() -> None:
    for cls in (NodeSpec, WorkerSpec, KVNodeSettings):
        names = [name for name in cls.__dataclass_fields__ if name.endswith("secret")]
        assert names
        assert not any(cls.__dataclass_fields__[name].repr for name in names)
