"""The specs that an engine and a worker get at their start. Knows nothing of models, tensors, routers or Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from checkpoint.errors import CheckpointError
from checkpoint.gguf.directory import find_gguf, open_gguf
from checkpoint.gguf.packaged import packaged_gguf
from kvstore.config import KV_CACHE_DTYPES, KV_ENCODINGS, KVStoreConfig, check_kv_forms
from settings.limits import Bounds, OneOf, check_limits
from workers.errors import ModelError

ROLES = ("prefill", "decode", "mixed")
DTYPES = ("auto", "float32", "bfloat16", "float16")
RUNNERS = ("torch", "fake")
POLICIES = ("fcfs", "priority", "deadline", "fair_share")
SPECULATIVE_METHODS = ("none", "ngram", "suffix", "grammar", "draft_model", "eagle3")
_MOST_DRAFT_TOKENS = 64
_DEFAULT_DRAFT_TOKENS = {"ngram": 8, "suffix": 16, "grammar": 16, "draft_model": 4, "eagle3": 4}
_SHARE = Bounds(at_least=0, at_most=1)
KV_SCALE_BYTES = 4  # fp32, one for each row that is kept in 8 bits


def resolve_model(model: str) -> Path:
    """The model directory of: a local directory; a GGUF file, or a directory with one; the name of a packaged model; or
    a Hugging Face Hub id, which is fetched into its cache.

    Raises ModelError when it is none of these.
    """
    try:
        path = Path(model).expanduser()
        if path.exists() or model.startswith((".", "/", "~")):
            return _local_model(model, path)
        packaged = packaged_gguf(model)
        if packaged is not None:
            return open_gguf(packaged)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that there is not
        raise ModelError(f"model.path: {model[:100]!r}: {getattr(error, 'strerror', None) or error}") from None
    return _fetched_model(model)


def _local_model(model: str, path: Path) -> Path:
    gguf = find_gguf(path)
    if gguf is not None and gguf.exists():
        return open_gguf(gguf)
    if not path.is_dir():
        raise ModelError(f"{model}: no such model directory")
    return path


def _fetched_model(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{model}: neither a model directory nor a Hub id that can be fetched ({reason})") from None


def kv_row_bytes(kv_encoding: str, head_dim: int, element_bytes: int) -> int:
    """What the keys or values of one layer, head and slot take up in a fragment: see workers.kv.codec."""
    return head_dim * element_bytes if kv_encoding == "none" else head_dim + KV_SCALE_BYTES


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingOptions:
    """In which order an engine serves its requests, and how much prefill it puts beside running streams."""

    policy: Annotated[str, OneOf(POLICIES)] = "fcfs"
    """Who is admitted next, and who is preempted last when KV blocks are short. fcfs: the earliest request. priority:
    the smallest `priority`. deadline: the earliest deadline. fair_share: the tenant that was served least."""
    priority_ageing_s: Annotated[float, Bounds(more_than=0)] = 10.0
    """priority: how long a request waits before it counts as one level more urgent. So one of priority p yields to
    later ones of priority q < p only if they come within (p - q) times as long."""
    deadline_patience_s: Annotated[float, Bounds(more_than=0)] = 60.0
    """deadline: a request without a deadline, or with a later one, counts as due so long after its arrival."""
    prompt_token_weight: Annotated[float, Bounds(at_least=0)] = 1.0
    """fair_share: what a token of a prompt counts as."""
    output_token_weight: Annotated[float, Bounds(more_than=0)] = 2.0
    """fair_share: what a generated token counts as."""
    tpot_target_s: Annotated[float, Bounds(at_least=0)] = 0.0
    """Longest time between two tokens that is aimed at: beside running streams, chunks of prompts are cut so that, by
    the measured cost of steps, 19 of 20 steps stay under it. 0 means that max_num_batched_tokens alone bounds them."""
    min_prefill_tokens: Annotated[int, Bounds(at_least=1, at_most=2**20)] = 32
    """Prompt tokens that a step may have whatever tpot_target_s is: prompts must come to an end."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeOptions:
    """How tokens are proposed, and how many. Whatever is proposed, the tokens of a stream are the same."""

    method: Annotated[str, OneOf(SPECULATIVE_METHODS)] = "none"
    """none, or where drafts come from. ngram: what followed the same tokens earlier in the request. suffix: the same,
    also in earlier requests of the same tenant on this worker. draft_model: a smaller model with the same tokenizer.
    eagle3: an EAGLE-3 head over the model's hidden states, which needs pp=1; it proposes the better the more of a
    request was computed on this worker. grammar: tokens that a request's grammar leaves no choice about; the other
    methods propose them, too."""
    model: str = ""
    """draft_model: the draft's directory, GGUF file, packaged model or Hub id. eagle3: the head's directory or Hub id.
    Empty with the demo model means its own draft or head."""
    num_speculative_tokens: Annotated[int, Bounds(at_least=0, at_most=_MOST_DRAFT_TOKENS)] = 0
    """Most draft tokens of a request in a step; 0 means 4 for draft_model and eagle3, 8 for ngram, 16 for suffix and
    grammar."""
    enable_adaptive_verification: bool = True
    """Whether each step takes only as many drafts as are expected to save time, by what was accepted of each request
    and by measured step times; none at all when none pay. Else every step takes all that are proposed."""
    num_speculative_tokens_per_batch_size: tuple[tuple[int, int, int], ...] = ()
    """[first, last, most]: with so many running requests, at most so many draft tokens of each. Sizes that no entry has
    are bounded by num_speculative_tokens alone."""
    prompt_lookup_min: Annotated[int, Bounds(at_least=1, at_most=64)] = 2
    """ngram: fewest last tokens that must have come before."""
    prompt_lookup_max: Annotated[int, Bounds(at_least=1, at_most=64)] = 5
    """ngram: most last tokens that are compared; of several places the one with the longest match counts."""
    suffix_decoding_max_tree_depth: Annotated[int, Bounds(at_least=2, at_most=256)] = 24
    """suffix: most last tokens that are compared."""
    suffix_decoding_max_cached_requests: Annotated[int, Bounds(at_least=0, at_most=1_000_000)] = 1000
    """suffix: how many finished requests a worker remembers, of all tenants; 0: none."""
    suffix_decoding_max_cached_tokens: Annotated[int, Bounds(at_least=0, at_most=2**31)] = 1_000_000
    """suffix: and how many tokens of them. Each takes about 200 bytes."""
    suffix_decoding_max_spec_factor: Annotated[float, Bounds(more_than=0, at_most=64)] = 1.0
    """suffix: a draft has at most so many times as many tokens as match."""
    suffix_decoding_min_token_prob: Annotated[float, _SHARE] = 0.1
    """suffix: a draft ends before a token that followed in a smaller share of the places."""
    draft_model_lookup_min: Annotated[int, Bounds(at_least=0, at_most=64)] = 4
    """draft_model, eagle3: where so many last tokens have come before, in the request or in an earlier one of its
    tenant, what followed them there is proposed, as with suffix, and the draft model is not asked; 0: it always is."""
    draft_temperature_scale: Annotated[float, Bounds(at_least=0, at_most=4)] = 1.0
    """draft_model, eagle3: times the request's temperature, in choosing drafts; 0: greedily."""
    draft_tensor_parallel_size: Annotated[int, Bounds(at_least=1, at_most=1)] = 1
    """draft_model, eagle3: ranks that compute the draft. It runs on rank 0 alone, so 1 is the only value."""
    draft_num_blocks: Annotated[int, Bounds(at_least=0, less_than=2**31)] = 0
    """draft_model, eagle3: KV blocks of the draft; 0 means as many as all sequences may need, within 64 MiB on a CPU
    and a tenth of the free memory on CUDA, but at least one whole context."""

    def __post_init__(self) -> None:
        if self.method == "mtp":
            raise ValueError("method: mtp drafts by heads of DeepSeek-V3 checkpoints, a family that is not served yet")
        size = self.draft_tensor_parallel_size
        _require(size == 1, "draft_tensor_parallel_size", f"must be 1, since a draft runs on rank 0 alone, not {size}")
        check_limits(self)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min: must not be above prompt_lookup_max={self.prompt_lookup_max}, "
                f"not {self.prompt_lookup_min}"
            )
        if self.model and self.method not in ("draft_model", "eagle3"):
            raise ValueError(f"model: method={self.method} has no draft model")
        _check_sizes(self.num_speculative_tokens_per_batch_size)

    def check_engine(self, pp: int, runner: str) -> None:
        """Raise ValueError unless an engine of so many pipeline stages can speculate so."""
        if self.method == "eagle3":
            _require(pp == 1, "speculative.method", f"eagle3 needs pp=1, not {pp}")
            _require(runner == "torch", "speculative.method", f"eagle3 needs the model's hidden states: not {runner}")

    @property
    def most_tokens(self) -> int:
        """Draft tokens of a request in a step, whatever the batch size."""
        return self.num_speculative_tokens or _DEFAULT_DRAFT_TOKENS.get(self.method, 0)

    def most_tokens_at(self, num_requests: int) -> int:
        """Draft tokens of a request in a step with so many running requests."""
        for first, last, most in self.num_speculative_tokens_per_batch_size:
            if first <= num_requests <= last:
                return min(most, self.most_tokens)
        return self.most_tokens


def _check_sizes(sizes: Sequence[Sequence[int]]) -> None:
    name, last_before = "num_speculative_tokens_per_batch_size", 0
    for first, last, most in sizes:
        if not last_before < first <= last:
            raise ValueError(f"{name}: [{first}, {last}, {most}] must be a range of sizes after {last_before}")
        if not 0 <= most <= _MOST_DRAFT_TOKENS:
            raise ValueError(f"{name}: [{first}, {last}, {most}] must have 0 to {_MOST_DRAFT_TOKENS} tokens")
        last_before = last


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an operator may choose for the engines of each pool. `pools.NAME` and an engine have these fields alike."""

    # Upper bounds: buffers and processes are made for so many before a request has come.

    tp: Annotated[int, Bounds(at_least=1, at_most=1024)] = 1
    """Tensor-parallel ranks of a pipeline stage; they share one host."""
    pp: Annotated[int, Bounds(at_least=1, at_most=1024)] = 1
    """Pipeline stages."""
    num_blocks: Annotated[int, Bounds(at_least=0, less_than=2**31)] = 0
    """Device KV blocks of a worker; 0 means from the free memory."""
    max_num_seqs: Annotated[int, Bounds(at_least=1, at_most=65536)] = 32
    """Most requests in a running batch."""
    max_num_batched_tokens: Annotated[int, Bounds(at_least=1, at_most=2**20)] = 512
    """Most tokens of one engine step."""
    enable_prefix_caching: bool = True
    """Whether finished blocks stay as cache."""
    num_threads: Annotated[int, Bounds(at_least=1, at_most=1024)] = 1
    """CPU threads of a rank."""
    cuda_graphs: bool | None = None
    """Whether steps run from captured graphs; null means on cuda. On a CPU only their buffers are the same."""
    compile: bool | None = None
    """Whether the operations between two attentions are compiled for this host's processor, by Inductor; on CPUs, with
    tp=1, without batch_invariant and adapters. null means for hidden sizes of 256 and more. It takes a C++ compiler and
    about a minute once; the libraries stay in the user's cache, so a pod needs a home that outlives it, or false. Where
    there is no compiler or no cache, steps run without."""
    async_scheduling: bool | None = None
    """Whether a step is planned while the one before it runs, or with pp stages while pp of them do; null means on
    cuda, where pp is 1. Not possible where both tp and pp are above 1."""
    rank_silence_s: Annotated[float, Bounds(at_least=1)] = 10.0
    """A rank whose process says nothing to the leader for so long is lost, and its worker with it."""
    rank_stall_s: Annotated[float, Bounds(at_least=1)] = 20.0
    """The same for a rank that is in a step and has computed no further layer for so long; longer than a layer of the
    largest step takes, and on cuda than all steps that are in flight."""
    scheduler: SchedulingOptions = dataclasses.field(default_factory=SchedulingOptions)
    """Which requests a step serves."""

    def __post_init__(self) -> None:
        check_limits(self)
        is_both = self.tp > 1 and self.pp > 1
        _require(not (self.async_scheduling and is_both), "async_scheduling", "needs tp=1 or pp=1")

    def options(self) -> dict[str, Any]:
        """These fields alone, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)}


@dataclass(frozen=True, slots=True)
class EngineConfig(EngineOptions):
    """One engine: what it computes with and how much at a time."""

    model_dir: str
    """Directory of the model, a GGUF file, the name of a packaged model, or a Hub id."""
    dtype: Annotated[str, OneOf(DTYPES)] = "auto"
    """float32, bfloat16 or float16; auto means float32 on CPU and bfloat16 on CUDA."""
    device: str = "auto"
    """cpu or cuda; auto means cuda where there is one."""
    block_size: Annotated[int, Bounds(at_least=1)] = 16
    """Tokens of a KV block."""
    max_model_len: Annotated[int, Bounds(at_least=0)] = 0
    """Most tokens of prompt and completion together; 0 means what the model allows."""
    runner: Annotated[str, OneOf(RUNNERS)] = "torch"
    """torch: the model. fake: tokens are hashes of the history, and no weights are read."""
    fake_step_s: Annotated[float, Bounds(at_least=0)] = 0.0
    """How long each step of the fake runner takes."""
    fake_token_s: Annotated[float, Bounds(at_least=0)] = 0.0
    """How much longer a step takes for each token of a prompt in it."""
    batch_invariant: bool = False
    """Whether a request's logits have the same bits whatever is computed beside it; slower."""
    kv_encoding: Annotated[str, OneOf(KV_ENCODINGS)] = "none"
    """none, int8 or fp8: how keys and values travel to the tiers and back."""
    kv_cache_dtype: Annotated[str, OneOf(KV_CACHE_DTYPES)] = "auto"
    """As kvstore.kv_cache_dtype."""
    kv_window_tokens: Annotated[int, Bounds(at_least=0, at_most=2**20)] = 32
    """As kvstore.kv_window_tokens."""
    kv_sink_tokens: Annotated[int, Bounds(at_least=0, at_most=2**20)] = 16
    """As kvstore.kv_sink_tokens."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of the model's files that are passed over though nothing is known of them."""
    plugins: tuple[str, ...] = ()
    """As model.plugins."""
    speculative: SpeculativeOptions = dataclasses.field(default_factory=SpeculativeOptions)
    """The `speculative` branch of the configuration."""
    enable_lora: bool = False
    """Whether requests may name a LoRA adapter. Without it nothing of the model is prepared for adapters."""
    max_loras: Annotated[int, Bounds(at_least=1, at_most=4096)] = 16
    """Adapters on the device at a time: those of one step are among them. Their memory is taken at the start."""
    max_lora_rank: Annotated[int, Bounds(at_least=1, at_most=512)] = 16
    """Largest rank of an adapter; on cuda each takes memory and time as if it had this one."""
    max_cpu_loras: Annotated[int, Bounds(at_least=0, at_most=65536)] = 0
    """Adapters in host memory, those on the device included; 0 means four times max_loras."""
    lora_load_timeout_s: Annotated[float, Bounds(more_than=0)] = 60.0
    """How long a request waits, from its arrival, for its adapter to be read from its files. A rank reads at most eight
    at a time; others wait their turn within that time."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        needs_bits = self.batch_invariant or self.runner == "fake"
        _require(
            self.kv_encoding == "none" or not needs_bits,
            "kv_encoding",
            f"{self.kv_encoding} changes bits: neither batch_invariant nor runner=fake",
        )
        check_kv_forms(self.kv_encoding, self.kv_cache_dtype)
        is_fake = self.runner == "fake"
        _require(self.kv_cache_dtype == "auto" or not is_fake, "kv_cache_dtype", "must be auto with runner=fake")
        self.speculative.check_engine(self.pp, self.runner)
        fits = not self.max_cpu_loras or self.max_cpu_loras >= self.max_loras
        _require(fits, "max_cpu_loras", f"{self.max_cpu_loras} is less than max_loras={self.max_loras}")

    @property
    def num_cpu_loras(self) -> int:
        """Adapters in host memory; see max_cpu_loras."""
        return self.max_cpu_loras or 4 * self.max_loras


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker: its engine, its identity in the cluster, and the KV tiers that it uses."""

    worker_id: str
    """Unique for the life of the worker's process."""
    pool: str
    """Name of its pool."""
    role: Annotated[str, OneOf(ROLES)]
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
    layers_per_fragment: Annotated[int, Bounds(at_least=0)] = 0
    """Layers that travel in one fragment; 0 means all layers of a stage."""
    listen_host: str = "127.0.0.1"
    """Address that the worker's server listens on."""
    cluster: str = ""
    """Name of the cluster: routers, KV nodes and peers of others are refused."""

    def __post_init__(self) -> None:
        check_limits(self)
        needs_secret = bool(self.kvstore.tier or self.kvstore.peers)
        _require(
            bool(self.tier_secret) or not needs_secret, "tier_secret", "needed where there is a tier outside the host"
        )
