from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from deploy import config
from deploy.config import EndpointsConfig, RayConfig
from deploy.errors import ConfigError, StartError
from deploy.preflight import (
    check_arena_dir,
    check_control,
    check_host_memory,
    check_model,
    check_ports,
    check_ray,
    free_port,
    tier_secret,
    tier_warning,
)
from kvstore.addresses import listen


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        check_model(config.load(None, overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_good_model_is_found(tiny_model: Path) -> None:
    found = check_model(config.load(None, [f"model.path={tiny_model}", "pools.decode.tp=2"]))
    assert found.directory == tiny_model
    assert found.reference == str(tiny_model)
    assert found.config.num_key_value_heads == 2


def test_the_fake_engine_needs_no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    assert "no *.safetensors file" in refusal(f"model.path={model}")
    assert check_model(config.load(None, [f"model.path={model}", "engine.runner=fake"])).directory == model


def test_no_such_directory() -> None:
    assert "no such model directory" in refusal("model.path=/no/such/model")


def test_a_directory_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert refusal(f"model.path={model}") == f"{model}/config.json: missing"


def test_an_unsupported_architecture_names_what_is_supported(model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "architectures": ["GPT2LMHeadModel"]}))
    said = refusal(f"model.path={model}")
    assert "GPT2LMHeadModel is not supported" in said
    assert "LlamaForCausalLM" in said


def test_a_tp_that_does_not_divide_the_heads_names_pool_and_numbers(model: Path) -> None:
    assert (
        refusal(f"model.path={model}", "pools.decode.tp=3")
        == "pools.decode: tp=3 does not divide num_attention_heads=4"
    )


def test_truncated_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights}: not readable as safetensors" in refusal(f"model.path={model}")


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no *.safetensors file" in refusal(f"model.path={model}")


@pytest.fixture
def taken_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_port_in_use_is_named(taken_port: int) -> None:
    with pytest.raises(ConfigError, match=rf"endpoints\.http_port: port {taken_port} on 127\.0\.0\.1 is in use"):
        check_ports(EndpointsConfig(grpc_port=0, http_port=taken_port), RayConfig())
    with pytest.raises(ConfigError, match=rf"endpoints\.grpc_port: port {taken_port}"):
        check_ports(EndpointsConfig(grpc_port=taken_port - 1, http_port=0, routers=2), RayConfig())
    with pytest.raises(ConfigError, match=r"ray\.dashboard_port"):
        check_ports(EndpointsConfig(grpc_port=0, http_port=0), RayConfig(dashboard_port=taken_port))


def test_rays_ports_are_not_ours_when_we_join(taken_port: int) -> None:
    check_ports(EndpointsConfig(grpc_port=0, http_port=0), RayConfig(address="h:1", dashboard_port=taken_port))


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"endpoints\.grpc_port: 203\.0\.113\.7:50051"):
        check_ports(EndpointsConfig(grpc_host="203.0.113.7"), RayConfig())


def test_free_ports(taken_port: int) -> None:
    assert free_port("127.0.0.1", taken_port) > taken_port
    assert free_port("127.0.0.1") > 0


def test_servers_that_are_away(taken_port: int) -> None:
    port = free_port("127.0.0.1")
    assert tier_warning("") == ""
    assert tier_warning(f"redis://127.0.0.1:{taken_port}/0") == ""
    warning = tier_warning(f"redis://127.0.0.1:{port}/0")
    assert warning.startswith(f"kvstore.tier: no Redis at 127.0.0.1:{port}")
    assert "\n" not in warning
    assert tier_warning(f"redis+cluster://:hush@127.0.0.1:{port},127.0.0.1:{taken_port}") == ""  # one is enough
    assert tier_warning(f"redis+cluster://:hush@127.0.0.1:{port}").startswith("kvstore.tier: no Redis at 127.0.0.1:")
    check_control("memory://")
    with pytest.raises(
        StartError, match=rf"ray\.address: no Ray cluster at 127\.0\.0\.1:{port} \(connection refused\)"
    ):
        check_ray(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=r"ray\.address: must be HOST:PORT, not 'auto'"):
        check_ray("auto")
    check_ray(f"127.0.0.1:{taken_port}")
    with pytest.raises(StartError, match=r"kvstore\.control: "):
        check_control(f"redis://127.0.0.1:{port}/0")


def test_the_tiers_secret_is_drawn_or_read(tmp_path: Path) -> None:
    assert tier_secret("") != tier_secret("")
    (tmp_path / "secret").write_text("0123456789abcdef\n")
    assert tier_secret(str(tmp_path / "secret")) == "0123456789abcdef"
    (tmp_path / "short").write_text("hush")
    with pytest.raises(ConfigError, match=r"kvstore\.tier_secret_file: .*short: has 4 characters, 16 are the least"):
        tier_secret(str(tmp_path / "short"))
    with pytest.raises(ConfigError, match=r"kvstore\.tier_secret_file: .*No such file"):
        tier_secret(str(tmp_path / "nothing"))


def test_more_host_memory_than_there_is_is_refused() -> None:
    check_host_memory(1 << 20)
    with pytest.raises(ConfigError, match=r"^kvstore\.host_bytes: 99999999999999999 is more than this machine"):
        check_host_memory(99999999999999999)


def test_a_folder_for_the_arena_that_is_not_there(tmp_path: Path) -> None:
    check_arena_dir(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^kvstore\.arena_dir: /no/such: no such folder$"):
        check_arena_dir("/no/such")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^kvstore\.arena_dir: .*/file: not a folder$"):
        check_arena_dir(str(tmp_path / "file"))
    (tmp_path / "closed").mkdir(mode=0o555)
    if os.geteuid():
        with pytest.raises(ConfigError, match=r"^kvstore\.arena_dir: .*/closed: not allowed to make files there$"):
            check_arena_dir(str(tmp_path / "closed"))


def test_ports_on_ipv6() -> None:
    with listen("::1", 0, backlog=1) as taken:
        port = taken.getsockname()[1]
        for host in ("::1", "[::1]"):
            with pytest.raises(ConfigError, match=rf"endpoints\.http_port: port {port} on \S*::1\S* is in use"):
                check_ports(EndpointsConfig(grpc_port=0, http_host=host, http_port=port), RayConfig())
    assert free_port("::1") > 0
    assert free_port("[::]", 20_000, reserved=range(20_000, 20_005)) >= 20_005
