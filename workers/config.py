"""What an engine and a worker are told at their start, and what a model directory says of itself.

Reads config.json and generation_config.json. Knows nothing of tensors, routers or Ray.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.config import KV_ENCODINGS, PREFIX_FETCH
from workers.errors import ModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
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
    def load(cls, directory: str | Path) -> ModelConfig:
        """Read a model directory. Raises ModelError naming the file or field."""
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelError(f"{directory}: no such model directory")
        raw = _read_json(directory / "config.json", required=True)
        generation = _read_json(directory / "generation_config.json", required=False)
        architecture = (raw.get("architectures") or ["(none named)"])[0]
        if architecture not in SUPPORTED_ARCHITECTURES:
            supported = ", ".join(SUPPORTED_ARCHITECTURES)
            raise ModelError(
                f"{directory}/config.json: architecture {architecture} is not supported (supported: {supported})"
            )
        return _parse(raw, generation, directory / "config.json")

    def check_split(self, tp: int, pp: int) -> None:
        """Raise ModelError unless the model can be cut into tp x pp shards."""
        width = "moe_intermediate_size" if self.num_experts else "intermediate_size"
        for field in ("num_attention_heads", "num_key_value_heads", width):
            if getattr(self, field) % tp:
                raise ModelError(f"tp={tp} does not divide {field}={getattr(self, field)}")
        if pp > self.num_hidden_layers:
            raise ModelError(f"pp={pp} is more than num_hidden_layers={self.num_hidden_layers}")


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    if not path.exists():
        if required:
            raise ModelError(f"{path}: missing")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content


def _parse(raw: dict[str, Any], generation: dict[str, Any], path: Path) -> ModelConfig:
    def size(field: str, default: int | None = None) -> int:
        value = raw.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"{path}: {field} must be a positive integer, not {value!r}")
        return value

    for unsupported in ("attention_bias", "mlp_bias"):
        if raw.get(unsupported):
            raise ModelError(f"{path}: {unsupported}=true is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act={raw['hidden_act']} is not supported (supported: silu)")
    experts: dict[str, Any] = {}
    if raw["architectures"][0] == "Qwen3MoeForCausalLM":
        if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
            raise ModelError(f"{path}: layers without experts among those with some are not supported")
        experts = {name: size(name) for name in ("num_experts_per_tok", "moe_intermediate_size")}
        experts["num_experts"] = size("num_experts", raw.get("num_local_experts"))  # as some writers call it
        experts["norm_topk_prob"] = bool(raw.get("norm_topk_prob", False))
        if experts["num_experts_per_tok"] > experts["num_experts"]:
            raise ModelError(f"{path}: num_experts_per_tok is more than num_experts={experts['num_experts']}")
    heads = size("num_attention_heads")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    return ModelConfig(
        architecture=raw["architectures"][0],
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", size("hidden_size") // heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings", 2048),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(rope, path),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=_union(raw.get("eos_token_id"), generation.get("eos_token_id")),
        has_qk_norm=raw["architectures"][0].startswith("Qwen3"),
        **experts,
    )


def _union(*stated: Any) -> tuple[int, ...]:
    """Ids that any file states, as one id or as a list; null states none."""
    lists = [ids if isinstance(ids, list) else [] if ids is None else [ids] for ids in stated]
    return tuple(dict.fromkeys(int(token_id) for ids in lists for token_id in ids))


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"{path}: rope scaling {kind!r} is not supported (supported: default, llama3)")
    try:
        return RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ModelError(f"{path}: rope scaling llama3 lacks {error.args[0]}") from None


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
        return cls(**{**raw, "engine": EngineConfig(**raw["engine"])})
