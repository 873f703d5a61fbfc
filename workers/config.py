"""What an engine and a worker are told at their start, and what a model directory says of itself.

Reads config.json and generation_config.json. Knows nothing of tensors, routers or Ray.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.config_keys import CONFIG_KEYS, DEFAULTS, MODEL_TYPES, ROPE_KEYS
from checkpoint.end_tokens import end_token_ids
from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.keys import check_keys
from kvstore.config import KV_ENCODINGS, KVStoreConfig
from workers.errors import ModelError

ROLES = ("prefill", "decode", "mixed")
DTYPES = ("auto", "float32", "bfloat16", "float16")
RUNNERS = ("torch", "fake")
KV_SCALE_BYTES = 4  # fp32, one for each row that is kept in 8 bits


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a model, under the names of its Hugging Face config.json."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    has_qk_norm: bool = False  # queries and keys are normed per head before they turn (Qwen 3)
    num_experts: int = 0  # in place of each layer's SwiGLU; 0: none
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # the chosen experts' weights add up to 1

    @classmethod
    def load(cls, directory: str | Path, ignore_keys: Collection[str] = ()) -> ModelConfig:
        """Read a model directory. Raises ModelError naming the file or field.

        ignore_keys: of config.json, that are passed over though nothing is known of them.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelError(f"{directory}: no such model directory")
        path = directory / "config.json"
        try:
            raw = read_json(path, is_required=True, ignored=ignore_keys)
            generation = read_json(directory / "generation_config.json", ignored=ignore_keys)
            architectures = raw.get("architectures")
            architecture = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
            if architecture not in CONFIG_KEYS:
                supported = ", ".join(CONFIG_KEYS)
                raise ModelError(f"{path}: architecture {architecture} is not supported (supported: {supported})")
            check_keys(raw, CONFIG_KEYS[architecture], path)
            return _parse(raw, generation, path)
        except CheckpointError as error:
            raise ModelError(str(error)) from None

    def check_split(self, tp: int, pp: int) -> None:
        """Raise ModelError unless the model can be cut into tp x pp shards."""
        width = "moe_intermediate_size" if self.num_experts else "intermediate_size"
        for field in ("num_attention_heads", "num_key_value_heads", width):
            if getattr(self, field) % tp:
                raise ModelError(f"tp={tp} does not divide {field}={getattr(self, field)}")
        if pp > self.num_hidden_layers:
            raise ModelError(f"pp={pp} is more than num_hidden_layers={self.num_hidden_layers}")


class _Fields:
    """The values of config.json, checked as they are taken."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path
        self.architecture: str = raw["architectures"][0]

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer. default: for null; for a key that is not there, where transformers has none."""
        value = self.raw.get(name, DEFAULTS[self.architecture].get(name))
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.wrong(name, "a positive integer", value)
        return value

    def flag(self, name: str) -> bool:
        """true or false, the default."""
        value = self.raw.get(name)
        if not isinstance(value, bool | None):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def number(self, name: str, default: float, raw: dict[str, Any] | None = None) -> float:
        """A positive number."""
        value = (self.raw if raw is None else raw).get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.wrong(name, "a positive number", value)
        return float(value)

    def wrong(self, name: str, kind: str, value: object) -> ModelError:
        """The error of a value that is none."""
        return ModelError(f"{self.path}: {name} must be {kind}, not {value!r}")


def _parse(raw: dict[str, Any], generation: dict[str, Any], path: Path) -> ModelConfig:
    fields = _Fields(raw, path)
    size = fields.size
    _check_kind(fields)
    heads = size("num_attention_heads")
    rope, rope_scaling = _rope(fields)
    return ModelConfig(
        architecture=fields.architecture,
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", size("hidden_size") // heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=fields.number("rope_theta", fields.number("rope_theta", 10000.0), rope),
        rope_scaling=rope_scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=end_token_ids(raw, generation, path.parent),
        has_qk_norm=fields.architecture.startswith("Qwen3"),
        **_experts(fields),
    )


def _check_kind(fields: _Fields) -> None:
    """What is said of the whole model, apart from its sizes."""
    raw = fields.raw
    wanted = MODEL_TYPES[fields.architecture]
    if raw.get("model_type") not in (None, wanted):
        raise fields.wrong("model_type", f"{wanted!r} for {fields.architecture}", raw["model_type"])
    if raw.get("hidden_act") not in (None, "silu"):
        raise ModelError(f"{fields.path}: hidden_act={raw['hidden_act']} is not supported (supported: silu)")
    layer_types = raw.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or set(layer_types) - {"full_attention"}):
        raise ModelError(f"{fields.path}: layer_types: only full_attention is supported, not {layer_types!r}")


def _experts(fields: _Fields) -> dict[str, Any]:
    if fields.architecture != "Qwen3MoeForCausalLM":
        return {}
    experts: dict[str, Any] = {name: fields.size(name) for name in ("num_experts_per_tok", "moe_intermediate_size")}
    others = fields.raw.get("num_local_experts")  # as some writers call it
    experts["num_experts"] = fields.size("num_experts", others)
    if others not in (None, experts["num_experts"]):
        raise ModelError(f"{fields.path}: num_local_experts={others!r} and num_experts={experts['num_experts']} differ")
    experts["norm_topk_prob"] = fields.flag("norm_topk_prob")
    if experts["num_experts_per_tok"] > experts["num_experts"]:
        raise ModelError(f"{fields.path}: num_experts_per_tok is more than num_experts={experts['num_experts']}")
    return experts


def _rope(fields: _Fields) -> tuple[dict[str, Any], RopeScaling | None]:
    """What rope_scaling or rope_parameters says, and Llama 3's scaling where it asks for it."""
    rope: dict[str, Any] = {}
    kind = "default"
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.raw.get(name)
        if not isinstance(part, dict | None):
            raise fields.wrong(name, "an object", part)
        if not part:
            continue
        said = part.get("rope_type") or part.get("type") or "default"
        if said not in ROPE_KEYS:
            known = ", ".join(sorted(ROPE_KEYS))
            raise ModelError(f"{fields.path}: {name}: rope scaling {said!r} is not supported (supported: {known})")
        check_keys(part, ROPE_KEYS[said], f"{fields.path}: {name}")
        if any(rope.get(key, value) != value for key, value in part.items()):
            raise ModelError(f"{fields.path}: rope_scaling and rope_parameters contradict each other")
        rope, kind = {**rope, **part}, said
    if kind == "default":
        return rope, None
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if rope.get(name) is None:
            raise ModelError(f"{fields.path}: rope scaling llama3 lacks {name}")
    scaling = RopeScaling(
        factor=fields.number("factor", 0, rope),
        low_freq_factor=fields.number("low_freq_factor", 0, rope),
        high_freq_factor=fields.number("high_freq_factor", 0, rope),
        original_max_position_embeddings=int(fields.number("original_max_position_embeddings", 0, rope)),
    )
    return rope, scaling


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


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an operator may choose for the engines of each pool. `pools.NAME` and an engine have these fields alike."""

    tp: int = 1
    """Tensor-parallel ranks of a pipeline stage; they share one host."""
    pp: int = 1
    """Pipeline stages."""
    num_blocks: int = 0
    """Device KV blocks of a worker; 0 means from the free memory."""
    max_num_seqs: int = 32
    """Most requests in a running batch."""
    max_num_batched_tokens: int = 512
    """Most tokens of one engine step."""
    enable_prefix_caching: bool = True
    """Whether finished blocks stay as cache."""
    num_threads: int = 1
    """CPU threads of a rank."""
    cuda_graphs: bool | None = None
    """Whether steps run from captured graphs; null means on cuda. On a CPU only their buffers are the same."""
    async_scheduling: bool | None = None
    """Whether a step is planned while the one before it runs; null means on cuda, where pp is 1. It needs pp=1: the
    first stage has no tokens before the last is through."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "max_num_seqs", "max_num_batched_tokens", "num_threads"):
            _require(getattr(self, name) >= 1, name, f"must be at least 1, not {getattr(self, name)}")
        _require(self.num_blocks >= 0, "num_blocks", f"must be >= 0, not {self.num_blocks}")
        _require(not self.async_scheduling or self.pp == 1, "async_scheduling", "needs pp=1")

    def options(self) -> dict[str, Any]:
        """These fields alone, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)}


@dataclass(frozen=True, slots=True)
class EngineConfig(EngineOptions):
    """One engine: what it computes with and how much at a time."""

    model_dir: str
    """Directory of the model, or a Hub id."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto means float32 on CPU and bfloat16 on CUDA."""
    device: str = "auto"
    """cpu or cuda; auto means cuda where there is one."""
    block_size: int = 16
    """Tokens of a KV block."""
    max_model_len: int = 0
    """Most tokens of prompt and completion together; 0 means what the model allows."""
    runner: str = "torch"
    """torch: the model. fake: tokens are hashes of the history, and no weights are read."""
    fake_step_s: float = 0.0
    """How long each step of the fake runner takes."""
    fake_token_s: float = 0.0
    """How much longer a step takes for each token of a prompt in it."""
    batch_invariant: bool = False
    """Whether a request's logits have the same bits whatever is computed beside it; slower."""
    kv_encoding: str = "none"
    """none, int8 or fp8: how keys and values travel to the tiers and back."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of the model's files that are passed over though nothing is known of them."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        _require(self.block_size >= 1, "block_size", f"must be at least 1, not {self.block_size}")
        _require(self.max_model_len >= 0, "max_model_len", f"must be >= 0, not {self.max_model_len}")
        for name, allowed in (("kv_encoding", KV_ENCODINGS), ("dtype", DTYPES), ("runner", RUNNERS)):
            value = getattr(self, name)
            _require(value in allowed, name, f"must be one of {', '.join(allowed)}, not {value!r}")
        needs_bits = self.batch_invariant or self.runner == "fake"
        _require(
            self.kv_encoding == "none" or not needs_bits,
            "kv_encoding",
            f"{self.kv_encoding} changes bits: neither batch_invariant nor runner=fake",
        )
        for name in ("fake_step_s", "fake_token_s"):
            _require(0 <= getattr(self, name) < math.inf, name, f"must be >= 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker: its engine, its place in the cluster, and the KV tiers that it uses."""

    worker_id: str
    """Unique for the life of the worker's process."""
    pool: str
    """Name of its pool."""
    role: str
    """prefill, decode or mixed: what it takes at first."""
    engine: EngineConfig
    """What it computes with."""
    model_name: str = "demo"
    """Name that clients use."""
    node_id: str = "local"
    """Name of its host in the directory."""
    host_address: str = ""
    """Of the KV node of this host; empty: no host tier."""
    kvstore: KVStoreConfig = dataclasses.field(default_factory=KVStoreConfig)
    """The `kvstore` branch of the configuration: the tiers outside of the host, and when to pull. What is derived from
    it stands beside it: engine.block_size, control, layers_per_fragment."""
    tier_secret: str = dataclasses.field(default="", repr=False)
    """Of the tiers outside of the host's memory; needed where there is one, or peers."""
    control: str = ""
    """URL of the directory to register in and to announce blocks to; empty: in none."""
    layers_per_fragment: int = 0
    """Layers that travel in one fragment; 0 means all layers of a stage."""
    listen_host: str = "127.0.0.1"
    """Address that the worker's server listens on."""
    cluster: str = ""
    """Name of the cluster: routers, KV nodes and peers of others are refused."""

    def __post_init__(self) -> None:
        _require(self.role in ROLES, "role", f"must be one of {', '.join(ROLES)}, not {self.role!r}")
        needs_secret = bool(self.kvstore.tier or self.kvstore.peers)
        _require(
            bool(self.tier_secret) or not needs_secret, "tier_secret", "needed where there is a tier outside the host"
        )
