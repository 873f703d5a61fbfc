"""What an engine and a worker are told at their start. Knows nothing of models, tensors, routers or Ray."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from kvstore.config import KV_ENCODINGS, PREFIX_FETCH
from workers.errors import ModelError

ROLES = ("prefill", "decode", "mixed")
DTYPES = ("auto", "float32", "bfloat16", "float16")
RUNNERS = ("torch", "fake")
KV_SCALE_BYTES = 4  # fp32, one for each row that is kept in 8 bits


def resolve_model(model: str) -> Path:
    """A local directory as it is; anything else is a Hugging Face Hub id and is fetched into its cache.

    Raises ModelError when it is neither.
    """
    path = Path(model).expanduser()
    if path.exists() or model.startswith((".", "/", "~")):
        if not path.is_dir():
            raise ModelError(f"{model}: no such model directory")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{model}: neither a model directory nor a Hub id that can be fetched ({reason})") from None


def kv_row_bytes(kv_encoding: str, head_dim: int, element_bytes: int) -> int:
    """What the keys or values of one layer, head and slot take up in a fragment: see workers.kv_codec."""
    return head_dim * element_bytes if kv_encoding == "none" else head_dim + KV_SCALE_BYTES


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: what it computes with and how much at a time."""

    model_dir: str
    dtype: str = "auto"  # auto: float32 on CPU, bfloat16 on CUDA
    device: str = "auto"  # auto: cuda when there is one
    tp: int = 1
    pp: int = 1
    block_size: int = 16  # tokens per KV block
    num_blocks: int = 0  # device KV blocks; 0: from the free memory
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 0  # tokens; 0: what the model allows
    enable_prefix_caching: bool = True
    num_threads: int = 1  # CPU threads per rank
    runner: str = "torch"  # fake: tokens are hashes of the history, and no weights are read
    fake_step_s: float = 0.0  # how long each step of the fake runner takes
    fake_token_s: float = 0.0  # and each token of a prompt beside it
    cuda_graphs: bool | None = None  # replay captured graphs; None: on CUDA. On a CPU only the buffers are the same
    async_scheduling: bool | None = None  # plan a step while the one before it runs; None: on CUDA, where pp is 1
    batch_invariant: bool = False  # a request's logits have the same bits whatever is computed beside it; slower
    kv_encoding: str = "none"  # one of KV_ENCODINGS: how keys and values travel to the tiers and back
    ignore_keys: tuple[str, ...] = ()  # keys of the model's files that are passed over though nothing is known of them
    plugins: tuple[str, ...] = ()  # modules with further families or weight formats, see workers.model.registry

    def __post_init__(self) -> None:
        for field in ("tp", "pp", "block_size", "max_num_seqs", "max_num_batched_tokens", "num_threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("num_blocks", "max_model_len"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, not {getattr(self, field)}")
        if self.async_scheduling and self.pp > 1:
            raise ValueError("async_scheduling needs pp=1: the first stage has no tokens before the last is through")
        if self.kv_encoding not in KV_ENCODINGS:
            raise ValueError(f"kv_encoding must be one of {', '.join(KV_ENCODINGS)}, not {self.kv_encoding}")
        if self.kv_encoding != "none" and (self.batch_invariant or self.runner == "fake"):
            raise ValueError(f"kv_encoding={self.kv_encoding} changes bits: neither batch_invariant nor runner=fake")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.runner not in RUNNERS:
            raise ValueError(f"runner must be one of {', '.join(RUNNERS)}, not {self.runner}")
        for field in ("fake_step_s", "fake_token_s"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must not be negative, not {getattr(self, field)}")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker: its engine, its place in the cluster, and the KV tiers that it uses."""

    worker_id: str
    pool: str
    role: str  # one of ROLES
    engine: EngineConfig
    model_name: str = "demo"
    node_id: str = "local"
    host_address: str = ""  # KV node of this host; "": no host tier
    tier: str = ""  # redis://... ; "": no remote tier
    peers: bool = False  # whether to pull from other hosts, which the directory at `control` names
    peer_transport: str = "tcp"  # one of kvstore.transport.PEER_TRANSPORTS
    tier_secret: str = dataclasses.field(default="", repr=False)  # needed where there is a remote tier, or peers
    tier_ttl_s: float = 3600.0
    tier_compression: str = "none"  # of what is put there: none or zstd
    prefix_fetch: str = "cheapest"  # one of PREFIX_FETCH
    control: str = ""  # where to register and announce blocks; "": nowhere
    layers_per_fragment: int = 0  # 0: all layers of a stage
    listen_host: str = "127.0.0.1"
    cluster: str = ""  # its name: routers, KV nodes and peers of others are refused

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {self.role}")
        if self.prefix_fetch not in PREFIX_FETCH:
            raise ValueError(f"prefix_fetch must be one of {', '.join(PREFIX_FETCH)}, not {self.prefix_fetch}")
        if (self.tier or self.peers) and not self.tier_secret:
            raise ValueError("tier_secret must be set where there is a tier outside the host")

    @classmethod
    def from_json(cls, text: str) -> WorkerSpec:
        """The inverse of json.dumps(dataclasses.asdict(spec))."""
        raw = json.loads(text)
        lists = {name: tuple(raw["engine"].get(name, ())) for name in ("ignore_keys", "plugins")}
        engine = {**raw["engine"], **lists}
        return cls(**{**raw, "engine": EngineConfig(**engine)})
