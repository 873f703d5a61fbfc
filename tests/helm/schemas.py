"""Strict validation against the schemas of Kubernetes and of the custom resource definitions."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator, Draft202012Validator
from kubernetes_validate import utils as kubernetes_schemas
from referencing import Registry, Resource

CRDS = Path(__file__).parent / "crds"


def core_problems(item: dict[str, Any], version: str) -> list[str]:
    """What the strict schema of a version of Kubernetes says of an object; an unknown kind is an error."""
    return _said(_core_validator(item["kind"], item["apiVersion"], version), item)


@functools.cache
def _core_validator(kind: str, api_version: str, version: str) -> Draft202012Validator:
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = kubernetes_schemas.schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    registry: Registry[Any] = Resource.from_contents(schema) @ _definitions(folder, version)
    return Draft202012Validator(schema, registry=registry)


@functools.cache
def _definitions(folder: str, version: str) -> Registry[Any]:
    made: Registry[Any] = Registry()
    contents = kubernetes_schemas.schema_contents(f"{folder}/_definitions.json", version)
    return Resource.from_contents(contents) @ made


@functools.cache
def custom_definitions() -> dict[tuple[str, str], dict[str, Any]]:
    """Versions of custom resources, by apiVersion and kind."""
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = version
    return found


def custom_problems(item: dict[str, Any]) -> list[str]:
    """What a custom resource's definition says of an object; a kind without one is an error."""
    return _said(_custom_validator(item["apiVersion"], item["kind"]), item)


@functools.cache
def _custom_validator(api_version: str, kind: str) -> Draft7Validator:
    schema = custom_definitions()[api_version, kind]["schema"]["openAPIV3Schema"]
    return Draft7Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """Refuses unknown fields, as the API server does; int-or-string and nullable as JSON schema has them."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {key: _strict(part) for key, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    if {"apiVersion", "kind", "metadata"} <= made.get("properties", {}).keys():
        made["properties"]["metadata"] = {"type": "object"}
    return made


def _said(validator: Any, item: dict[str, Any]) -> list[str]:
    errors = sorted(validator.iter_errors(item), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]
