"""Check 10 of the chart, and the commands of its pods: what the objects ask of our code exists."""

from __future__ import annotations

import importlib
from typing import Any

import click
import pytest
import yaml

from deploy.cli import cli
from tests.helm.rendering import PROFILES, cluster_yaml, objects, pods, ray_service

each_profile = pytest.mark.parametrize("profile", PROFILES)


def serve_config(profile: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(ray_service(objects(profile))["spec"]["serveConfigV2"])
    return read


@each_profile
def test_check_10_serve_takes_the_configuration(profile: str) -> None:
    schema = pytest.importorskip("ray.serve.schema")
    read = serve_config(profile)
    made = schema.ServeDeploySchema.model_validate(read)
    assert set(read) <= set(schema.ServeDeploySchema.model_fields)
    assert set(read["http_options"]) <= set(schema.HTTPOptionsSchema.model_fields)
    for application in read["applications"]:
        assert set(application) <= set(schema.ServeApplicationSchema.model_fields)
        for deployment in application.get("deployments", []):
            assert set(deployment) <= set(schema.DeploymentSchema.model_fields)
    assert [app.name for app in made.applications] == sorted(cluster_yaml(objects(profile))["pools"])
    assert all(app.external_scaler_enabled for app in made.applications)


def test_check_10_the_builder_can_be_imported() -> None:
    for application in serve_config("disaggregated")["applications"]:
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def _commands() -> set[tuple[str, ...]]:
    """The options and subcommands that pods give to `switchyard`."""
    found = set()
    for profile in PROFILES:
        for pod in pods(objects(profile)):
            command = [*pod.main.get("command", []), *pod.main.get("args", [])]
            if command and command[0] == "/bin/sh":
                command = command[2].split(";")[0].split()
            if command and command[0] == "switchyard":
                found.add(tuple(command[1:]))
    return found


def test_the_pods_run_these_commands() -> None:
    assert {command[0] for command in _commands()} == {"router", "autoscaler", "models", "status", "generate"}


@pytest.mark.parametrize("name", ["autoscaler", "generate", "models", "router", "status"])
def test_commands_of_the_pods_exist_with_their_options(name: str) -> None:
    for words in (list(command) for command in _commands() if command[0] == name):
        command: click.Command = cli
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_a_worker_drains_with_a_module_that_exists() -> None:
    (worker,) = [pod for pod in pods(objects("tp")) if pod.component == "worker"]
    command = worker.main["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(command[2]) is not None
