"""Limits of fields: what the classes refuse and what the schema refuses are the same."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import jsonschema
import pytest

from deploy import config
from deploy.config import ClusterConfig
from deploy.errors import ConfigError
from settings.docs import branches, json_schema
from settings.limits import Bounds, Matches, OneOf, check_limits, limits_of
from settings.loading import SettingsError, build


@dataclass(frozen=True, slots=True)
class Example:
    num_steps: Annotated[int, Bounds(at_least=1, at_most=8)] = 1
    """Steps."""
    share: Annotated[float, Bounds(more_than=0, less_than=1)] = 0.5
    """Share."""
    num_bytes: Annotated[int, Bounds(at_least=10, less_than=2**40, or_zero=True)] = 0
    """Bytes."""
    mode: Annotated[str, OneOf(("off", "on", "auto"))] = "auto"
    """Mode."""
    folder: Annotated[str, Matches("/.*", "an absolute path")] = "/"
    """Folder."""
    amounts: dict[str, Annotated[float, Bounds(more_than=0)]] = field(default_factory=dict)
    """Amounts."""
    folders: tuple[Annotated[str, Matches("/.*", "an absolute path")], ...] = ()
    """Folders."""

    def __post_init__(self) -> None:
        check_limits(self)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"num_steps": 0}, "num_steps: must be at least 1, not 0"),
        ({"num_steps": 9}, "num_steps: must be at most 8, not 9"),
        ({"share": 0}, "share: must be more than 0, not 0.0"),
        ({"share": 1}, "share: must be less than 1, not 1.0"),
        ({"num_bytes": 9}, "num_bytes: must be 0 or at least 10, not 9"),
        ({"num_bytes": 2**40}, "num_bytes: must be less than 2^40, not 1099511627776"),
        ({"mode": "of"}, "mode: must be one of off, on, auto, not 'of'"),
        ({"folder": "a"}, "folder: must be an absolute path, not 'a'"),
        ({"amounts": {"x": 0}}, "amounts.x: must be more than 0, not 0.0"),
        ({"folders": ["/", "a"]}, "folders: must be an absolute path, not 'a'"),
    ],
)
def test_class_and_schema_refuse_the_same(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        build(Example, raw)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, json_schema(Example))


def test_values_on_the_bounds_are_right() -> None:
    raw = {"num_steps": 8, "share": 0.999, "num_bytes": 10, "mode": "on", "folder": "/a", "amounts": {"x": 1e-9}}
    build(Example, raw)
    jsonschema.validate(raw, json_schema(Example))


def test_an_integer_may_have_any_size() -> None:
    assert Bounds(at_least=0).problem(10**400) == ""
    assert "at most 5" in Bounds(at_most=5).problem(10**400)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"^amounts\.x: must be (more than 0|finite), not"):
        Example(amounts={"x": value})


def cases() -> Iterator[tuple[str, Any]]:
    """Each field of the cluster's configuration that has bounds, with values just outside of them."""
    for name, hint in typing.get_type_hints(ClusterConfig).items():
        cls, path = (typing.get_args(hint)[1], "pools.m") if name == "pools" else (hint, name)
        if cls is str:
            continue
        for key, below in typing.get_type_hints(cls, include_extras=True).items():
            for limit in limits_of(below):
                if isinstance(limit, Bounds):
                    step = 1 if typing.get_args(below)[0] is int else 0.001
                    outside = [
                        *([] if limit.at_least is None else [limit.at_least - step, -2]),
                        *([] if limit.more_than is None else [limit.more_than, -2]),
                        *([] if limit.at_most is None else [limit.at_most + step]),
                        *([] if limit.less_than is None else [limit.less_than]),
                    ]
                    yield from ((f"{path}.{key}", value) for value in outside)
                else:
                    yield f"{path}.{key}", "?"


@functools.cache
def cluster_schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema(ClusterConfig))


@pytest.mark.parametrize(("key", "value"), list(cases()))
def test_the_clusters_class_and_schema_refuse_the_same(key: str, value: Any) -> None:
    raw: dict[str, Any] = {"pools": {"m": {"role": "mixed"}}}
    *above, last = key.split(".")
    branch = raw
    for part in above:
        branch = branch.setdefault(part, {})
    branch[last] = value
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: "):
        config.parse(raw)
    (refused,) = cluster_schema().iter_errors(raw)
    assert ".".join(map(str, refused.absolute_path)) == key


def test_every_number_of_the_configuration_has_bounds() -> None:
    without = [
        f"{cls.__name__}.{name}"
        for cls in branches(ClusterConfig)
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        if hint in (int, float)
    ]
    assert without == []


def test_a_word_that_yaml_reads_as_a_boolean_is_the_word() -> None:
    assert build(Example, {"mode": False}).mode == "off"
    assert build(Example, {"mode": True}).mode == "on"
    jsonschema.validate({"mode": False}, json_schema(Example))
    assert config.parse({"autoscaling": {"mode": False}}).autoscaling.mode == "off"
    assert config.load(None, ["autoscaling.mode=off"]).autoscaling.mode == "off"
    with pytest.raises(ConfigError, match=r"^autoscaling\.mode: must be a valid string, not true$"):
        config.parse({"autoscaling": {"mode": True}})
    with pytest.raises(ConfigError, match=r"^autoscaling\.policy: must be a valid string, not false$"):
        config.parse({"autoscaling": {"policy": False}})
