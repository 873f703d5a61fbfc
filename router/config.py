"""The spec that a router process gets at its start. Knows the fields and their ranges, not where they came from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from router.model_files import GENERATION_CONFIG, ModelLimits
from router.placement.policy import POLICIES
from settings.docs import CHOICES

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How routers place and serve requests."""

    policy: str = field(default="cheapest", metadata={CHOICES: tuple(POLICIES)})
    """How a request is placed: cheapest, by what is predicted to take the least time, or least_loaded."""
    window_tokens: int = 64
    """How far a worker may be ahead of the client that reads its stream."""
    max_inflight_requests: int = 1024
    """Most requests admitted and not yet ended; more are refused with a retry-after."""
    max_prompt_bytes: int = 2 * 2**20
    """Longer texts are refused before they are encoded."""
    max_message_bytes: int = 16 * 2**20
    """Most bytes of one gRPC message or HTTP body; below it a bad prompt gets a clean error."""
    max_replacements: int = 3
    """How often one stream may be placed anew after losing its worker."""
    new_request_wait_s: float = 2.0
    """How long a new request waits for a first worker."""
    replacement_wait_s: float = 30.0
    """How long a stream that lost its worker waits for another."""
    first_token_wait_s: float = 300.0
    """A placement that brings no token for so long, though its worker lives, is given up."""
    next_token_wait_s: float = 60.0
    """A placement whose next token takes so long is given up, too."""
    request_timeout_s: float = 1800.0
    """Deadline of a request whose client set none; 0 means none."""
    directory_poll_s: float = 0.25
    """How often the directory is asked for the workers."""
    worker_silence_s: float = 10.0
    """A worker that sends nothing for so long is lost; it reports every second."""
    drain_s: float = 10.0
    """How long running streams may go on after SIGTERM."""
    prefill_ms_per_token: float = 0.2
    """First guess of the cost model; each pool's measured speed replaces it."""
    decode_ms_per_step: float = 10.0
    """First guess of the cost model; each pool's measured speed replaces it."""
    transfer_ms_per_block: float = 0.5
    """What the cost model takes for moving one KV block."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the HTTP API; "*" means all."""

    def __post_init__(self) -> None:
        _require(self.policy in POLICIES, "policy", f"must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        for name in ("window_tokens", "max_inflight_requests", "max_prompt_bytes", "max_message_bytes"):
            _require(getattr(self, name) >= 1, name, f"must be at least 1, not {getattr(self, name)}")
        for name in ("window_tokens", "max_message_bytes"):  # the wire and gRPC have 32 bits for them
            _require(getattr(self, name) < 2**31, name, f"must be less than 2^31, not {getattr(self, name)}")
        _require(self.max_replacements >= 0, "max_replacements", f"must be >= 0, not {self.max_replacements}")
        for name in (
            "directory_poll_s",
            "worker_silence_s",
            "first_token_wait_s",
            "next_token_wait_s",
            "prefill_ms_per_token",
            "decode_ms_per_step",
        ):
            _require(0 < getattr(self, name) < math.inf, name, f"must be > 0, not {getattr(self, name)}")
        for name in ("new_request_wait_s", "replacement_wait_s", "request_timeout_s", "drain_s"):
            _require(0 <= getattr(self, name) < math.inf, name, f"must be >= 0, not {getattr(self, name)}")
        ms_per_block = self.transfer_ms_per_block
        _require(ms_per_block >= 0, "transfer_ms_per_block", f"must be >= 0, not {ms_per_block}")
        for origin in self.cors_origins:
            is_origin = origin == "*" or _ORIGIN.fullmatch(origin) is not None
            _require(is_origin, "cors_origins", f"{origin!r} is neither SCHEME://HOST[:PORT] nor *")


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """One router process: who it is, what it serves, where it listens and where it finds its workers."""

    router_id: str
    """Stays the same when the router is started anew."""
    model_dir: str
    """Directory of the model's tokenizer, chat template and defaults."""
    model_name: str
    """Name that clients use."""
    control: str
    """URL for kvstore.connect.open_directory."""
    journal: str = ""
    """URL for kvstore.connect.open_journal; empty means that no stream can be resumed."""
    grpc_host: str = "127.0.0.1"
    """Address that gRPC listens on."""
    grpc_port: int = 50051
    """Its port; 0 means any free one."""
    http_host: str = "127.0.0.1"
    """Address that HTTP listens on."""
    http_port: int = 8000
    """Its port; 0 means any free one."""
    generation_config: str = "auto"
    """As model.generation_config."""
    config: RouterConfig = field(default_factory=RouterConfig)
    """The `router` branch of the configuration."""
    cluster: str = ""
    """Name of the cluster: workers, KV nodes and streams of others are refused."""
    weights: str = ""
    """Digest of the weights that workers must have; empty means those of the first worker that connects."""
    ignore_keys: tuple[str, ...] = ()
    """As model.ignore_keys."""
    model_limits: ModelLimits = field(default_factory=ModelLimits)
    """What the model's family reads of config.json."""

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            _require(0 <= getattr(self, name) <= 65535, name, "must be between 0 and 65535")
        kinds, kind = ", ".join(GENERATION_CONFIG), self.generation_config
        _require(kind in GENERATION_CONFIG, "generation_config", f"must be one of {kinds}, not {kind!r}")


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {message}")
