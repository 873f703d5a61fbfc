"""What a router process is told at its start. Knows the fields and their ranges, not where they came from."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.errors import ConfigError
from router.model_files import GENERATION_CONFIG, ModelLimits
from router.policy import POLICIES

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Everything about a router that an operator may want to change."""

    policy: str = "cheapest"  # a key of policy.POLICIES
    window_tokens: int = 64  # a worker may be this far ahead of the client that reads its stream
    max_inflight_requests: int = 1024  # admitted and not yet ended; more are refused with a retry-after
    max_prompt_bytes: int = 2 * 2**20  # longer texts are refused before they are encoded
    max_message_bytes: int = 16 * 2**20  # of one gRPC message or HTTP body; below it a bad prompt gets a clean error
    max_replacements: int = 3  # times that one stream may be placed anew after losing its worker
    new_request_wait_s: float = 2.0  # how long a new request waits for a first worker
    replacement_wait_s: float = 30.0  # how long a stream that lost its worker waits for another
    first_token_wait_s: float = (
        300.0  # a placement that brings no token for so long, though its worker lives, is given up
    )
    next_token_wait_s: float = 60.0  # and so is one whose next token takes so long
    request_timeout_s: float = 1800.0  # deadline of a request whose client set none; 0 means none
    directory_poll_s: float = 0.25
    worker_silence_s: float = 10.0  # a worker that says nothing for so long is lost; it reports every second
    drain_s: float = 10.0  # after SIGTERM, running streams get this long to end
    prefill_ms_per_token: float = 0.2  # first guesses of the cost model; each pool's own speed replaces them
    decode_ms_per_step: float = 10.0
    transfer_ms_per_block: float = 0.5
    cors_origins: tuple[str, ...] = ()  # web pages of these origins may call the HTTP API; "*" means all

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"router.policy: must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        for name in ("window_tokens", "max_inflight_requests", "max_prompt_bytes", "max_message_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"router.{name}: must be at least 1")
        if self.max_replacements < 0:
            raise ConfigError("router.max_replacements: must not be negative")
        for name in (
            "directory_poll_s",
            "worker_silence_s",
            "first_token_wait_s",
            "next_token_wait_s",
            "prefill_ms_per_token",
            "decode_ms_per_step",
        ):
            _require(name, getattr(self, name), math.isfinite(getattr(self, name)) and getattr(self, name) > 0)
        for name in ("new_request_wait_s", "replacement_wait_s", "request_timeout_s", "drain_s"):
            _require(name, getattr(self, name), math.isfinite(getattr(self, name)) and getattr(self, name) >= 0)
        _require("transfer_ms_per_block", self.transfer_ms_per_block, self.transfer_ms_per_block >= 0)
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"router.cors_origins: {origin!r} is neither SCHEME://HOST[:PORT] nor *")


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """One router process: who it is, what it serves, where it listens and where it finds its workers."""

    router_id: str
    model_dir: str
    model_name: str
    control: str  # URL for kvstore.connect.open_directory
    journal: str = ""  # URL for kvstore.connect.open_journal; empty means that no stream can be resumed
    grpc_host: str = "127.0.0.1"
    grpc_port: int = 50051  # 0 means any free one
    http_host: str = "127.0.0.1"
    http_port: int = 8000
    generation_config: str = "auto"  # one of model_files.GENERATION_CONFIG
    config: RouterConfig = field(default_factory=RouterConfig)
    cluster: str = ""  # its name: workers, KV nodes and streams of others are refused
    weights: str = ""  # digest of the weights that workers must have
    ignore_keys: tuple[str, ...] = ()  # keys of the model's files that are passed over though nothing is known of them
    model_limits: ModelLimits = field(default_factory=ModelLimits)

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name}: must be between 0 and 65535")
        if self.generation_config not in GENERATION_CONFIG:
            kinds = ", ".join(GENERATION_CONFIG)
            raise ConfigError(f"generation_config: must be one of {kinds}, not {self.generation_config!r}")


def load_spec(path: str | Path) -> RouterSpec:
    """Read a RouterSpec from JSON. Raises ConfigError naming the path of the first key that is wrong."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    spec = _build(RouterSpec, content, "")
    assert isinstance(spec, RouterSpec)
    return spec


def _build(cls: type, content: object, prefix: str) -> Any:
    if not isinstance(content, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'spec'}: must be an object")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in content:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}: unknown key")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ConfigError(f"{prefix}{name}: missing")
    return cls(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in content.items()})


def _value(kind: type, value: object, path: str) -> object:
    if dataclasses.is_dataclass(kind) and not isinstance(kind, types.GenericAlias):
        return _build(kind, value, f"{path}.")
    if isinstance(kind, types.GenericAlias) and typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: must be a list, not {type(value).__name__}")
        (entry, _) = typing.get_args(kind)
        return tuple(_value(entry, item, f"{path}.{index}") for index, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{path}: must be {kind.__name__}, not {type(value).__name__}")
    return value


def _require(name: str, value: float, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"router.{name}: {value} is out of range")
