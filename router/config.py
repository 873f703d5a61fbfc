"""The spec that a router process gets at its start. Knows the fields and their ranges, not where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from router.adapters.config import AdaptersConfig
from router.adapters.targets import AdapterTarget
from router.model_files import GENERATION_CONFIG, ModelLimits
from router.placement.policy import POLICIES
from settings.limits import Bounds, Matches, OneOf, check_limits

_ORIGIN = Matches(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", "SCHEME://HOST[:PORT] or *")
_PORT = Bounds(at_least=0, at_most=65535)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How routers place and serve requests."""

    policy: Annotated[str, OneOf(tuple(POLICIES))] = "cheapest"
    """How a request is placed: cheapest, by what is predicted to take the least time, or least_loaded."""
    window_tokens: Annotated[int, Bounds(at_least=1, less_than=2**31)] = 64
    """How far a worker may be ahead of the client that reads its stream."""
    max_inflight_requests: Annotated[int, Bounds(at_least=1)] = 1024
    """Most requests admitted and not yet ended; more are refused with a retry-after."""
    max_prompt_bytes: Annotated[int, Bounds(at_least=1)] = 2 * 2**20
    """Longer texts are refused before they are encoded."""
    max_message_bytes: Annotated[int, Bounds(at_least=1, less_than=2**31)] = 16 * 2**20
    """Most bytes of one gRPC message or HTTP body; below it a bad prompt gets a clean error."""
    max_replacements: Annotated[int, Bounds(at_least=0)] = 3
    """How often one stream may be placed anew after losing its worker."""
    new_request_wait_s: Annotated[float, Bounds(at_least=0)] = 2.0
    """How long a new request waits for a first worker."""
    replacement_wait_s: Annotated[float, Bounds(at_least=0)] = 30.0
    """How long a stream that lost its worker waits for another."""
    first_token_wait_s: Annotated[float, Bounds(more_than=0)] = 300.0
    """A placement that brings no token for so long, though its worker lives, is given up."""
    next_token_wait_s: Annotated[float, Bounds(more_than=0)] = 60.0
    """A placement whose next token takes so long is given up, too."""
    request_timeout_s: Annotated[float, Bounds(at_least=0)] = 1800.0
    """Deadline of a request whose client set none; 0 means none."""
    directory_poll_s: Annotated[float, Bounds(more_than=0)] = 0.25
    """How often the directory is asked for the workers."""
    worker_silence_s: Annotated[float, Bounds(more_than=0)] = 10.0
    """A worker that sends nothing for so long is lost; it reports every second."""
    drain_s: Annotated[float, Bounds(at_least=0)] = 10.0
    """How long running streams may go on after SIGTERM."""
    prefill_ms_per_token: Annotated[float, Bounds(more_than=0)] = 0.2
    """First guess of the cost model; each pool's measured speed replaces it."""
    decode_ms_per_step: Annotated[float, Bounds(more_than=0)] = 10.0
    """First guess of the cost model; each pool's measured speed replaces it."""
    transfer_ms_per_block: Annotated[float, Bounds(at_least=0)] = 0.5
    """What the cost model takes for moving one KV block."""
    cors_origins: tuple[Annotated[str, _ORIGIN], ...] = ()
    """Origins whose web pages may call the HTTP API; "*" means all."""

    def __post_init__(self) -> None:
        check_limits(self)


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
    grpc_port: Annotated[int, _PORT] = 50051
    """Its port; 0 means any free one."""
    http_host: str = "127.0.0.1"
    """Address that HTTP listens on."""
    http_port: Annotated[int, _PORT] = 8000
    """Its port; 0 means any free one."""
    generation_config: Annotated[str, OneOf(GENERATION_CONFIG)] = "auto"
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
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    """The `adapters` branch of the configuration."""
    adapter_targets: tuple[AdapterTarget, ...] = ()
    """The model's linear modules."""
    adapter_registry: str = "memory://"
    """URL for kvstore.connect.open_adapter_registry."""

    def __post_init__(self) -> None:
        check_limits(self)
