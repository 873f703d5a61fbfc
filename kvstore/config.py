"""The `kvstore` branch of the cluster's configuration, and the spec that a KV node process gets at its start.

Knows nothing of how the other branches are read; numbers that are derived from it are computed by those who need them.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs, quote, urlsplit

from kvstore.network.quick_calls import UNIX
from settings.limits import Bounds, Matches, OneOf, check_limits

DISK_WRITES = ("back", "through")
PREFIX_FETCH = ("cheapest", "always", "never")
KV_ENCODINGS = ("none", "int8", "fp8")  # of keys and values on their way, with loss
KV_MIXED_PRECISIONS = ("kivi8_4", "kivi4", "kivi4_2", "kivi2", "kivi2_v1", "wkv4", "token4", "token2")
KV_CACHE_DTYPES = ("auto", "int8", "fp8", *KV_MIXED_PRECISIONS)  # of keys and values in the paged cache
# Scales are shared by a block's tokens: in smaller blocks they cost more than the codes.
MIXED_PRECISION_BLOCK_TOKENS = 32
COMPRESSIONS = ("none", "zstd")  # of the bytes of a fragment, without
CALLS_SUFFIX = ".calls"  # behind the path of a node's host address: the socket for slot calls
_LEAST_DISK_BYTES = 16 * 1024 * 1024
_MOST_BLOCK_TOKENS = 65536
_LONGEST_SOCKET_PATH = 107  # bytes; the kernel's limit
PEER_TRANSPORTS = ("tcp", "nixl")
_FOLDER = Matches("/.*", "an absolute path")
_CONTROL = Matches("(memory://|rediss?://).*", "memory:// or a redis:// URL")
_TIER = Matches(r"((rediss?|rediss?\+cluster)://.*)?", "empty or a redis:// URL")
_NODE_ID = Matches("[A-Za-z0-9._-]{1,200}", "1 to 200 letters, digits, dots, - and _")
PASSWORD_FILE = "password_file"  # of a Redis, in the query of its URL


def check_peer_transport(name: str) -> None:
    """Raises ValueError, without the name of the setting, for one that there is not, or that cannot work here."""
    if name not in PEER_TRANSPORTS:
        raise ValueError(f"must be one of {', '.join(PEER_TRANSPORTS)}, not {name!r}")
    if name == "nixl" and importlib.util.find_spec("nixl") is None:
        raise ValueError("nixl needs the nixl package, which is not installed: pip install 'switchyard[nixl]'")


def check_kv_forms(kv_encoding: str, kv_cache_dtype: str) -> None:
    """Raises ValueError, with the name of the setting, where blocks would be rounded twice."""
    if kv_encoding != "none" and kv_cache_dtype != "auto":
        raise ValueError(
            f"kv_encoding: must be none, not {kv_encoding!r}: with kv_cache_dtype={kv_cache_dtype}"
            " blocks travel as they lie in the cache"
        )


@dataclass(frozen=True, slots=True)
class KVStoreConfig:
    """Paging, naming and the tiers that fragments of KV blocks are kept in."""

    block_size: Annotated[int, Bounds(at_least=0, at_most=_MOST_BLOCK_TOKENS)] = 0
    """Tokens of a KV block: the unit of paging, naming and transfer. 0 means 16 on CPU (32 with a
    kivi or token scheme), 64 on CUDA."""
    layers_per_fragment: Annotated[int, Bounds(at_least=0)] = 0
    """Layers that travel in one fragment. 0 means derived from the model and the pools' pipeline stages."""
    host_bytes: Annotated[int, Bounds(at_least=1024 * 1024)] = 512 * 1024 * 1024
    """Size of each host's shared-memory arena, at most: no more than 0.8 of what is free in its folder, nor half of
    the memory that can be had."""
    arena_dir: Annotated[str, _FOLDER] = "/dev/shm"
    """Folder of the arena's file; one that is kept in memory."""
    disk_bytes: Annotated[int, Bounds(at_least=_LEAST_DISK_BYTES, less_than=2**62, or_zero=True)] = 0
    """Bound of each host's disk tier, which takes what does not fit into the arena; 0: there is none."""
    disk_dir: str = ""
    """Folder of the disk tier, kept from one start to the next; each host and each cluster needs its own."""
    disk_write: Annotated[str, OneOf(DISK_WRITES)] = "back"
    """back: fragments go to disk before the arena gives their slots away; through: as soon as they are complete."""
    kv_encoding: Annotated[str, OneOf(KV_ENCODINGS)] = "none"
    """none, or int8 or fp8 (e4m3): keys and values travel, and lie in all tiers, as 8-bit numbers with a scale per
    row. A fourth of the bytes of float32, half of bfloat16's; some tokens change (`python -m bench.kv.encodings`)."""
    kv_cache_dtype: Annotated[str, OneOf(KV_CACHE_DTYPES)] = "auto"
    """How the paged cache itself keeps keys and values, and so all tiers; what it saves is streams that fit. auto: in
    the model's dtype. int8: with a scale of each token and head. fp8 (e4m3): divided by a fixed scale of each head,
    the checkpoint's k_scale and v_scale or else 1. kivi4, kivi2 (arXiv:2402.02750): blocks are packed in 4 or 2 bits
    when they are full, keys per channel and values per token; the newest and the first tokens stay exact. kivi2_v1:
    values in 1 bit. kivi8_4, kivi4_2: 8 (4) bits up to 128 tokens back, then 4 (2). token4, token2: keys per token
    too, which loses more. wkv4 (arXiv:2402.12065): as token4, behind a scale and a shift of each channel, which
    `switchyard quantize --method wkv` learns; where the checkpoint has none it is token4. Other than auto,
    kv_encoding must be none."""
    kv_window_tokens: Annotated[int, Bounds(at_least=0, at_most=2**20)] = 32
    """kivi and token schemes: tokens behind each token, itself included, whose keys and values it sees exactly; no
    fewer than a block has."""
    kv_sink_tokens: Annotated[int, Bounds(at_least=0, at_most=2**20)] = 16
    """kivi and token schemes: tokens at the beginning of a request that stay exact."""
    disk_compression: Annotated[str, OneOf(COMPRESSIONS)] = "none"
    """none, or zstd: without loss, where it saves whole pages. Of what is written from now on; both forms are read."""
    peers: bool = False
    """Whether hosts pull fragments from each other. Bytes are tagged and verified, but not encrypted."""
    peer_transport: Annotated[str, OneOf(PEER_TRANSPORTS)] = "tcp"
    """How peers pull: tcp, or nixl (the nixl package reads from other hosts' memory, over RDMA where there is such a
    network). With nixl, a process that can read a host's memory can also write there: its network must be
    private."""
    tier: Annotated[str, _TIER] = ""
    """redis:// or rediss:// URL of the tier that hosts share, or redis+cluster://HOST:PORT,HOST:PORT (rediss+cluster)
    with any nodes of a Redis cluster; empty means shared memory alone."""
    tier_compression: Annotated[str, OneOf(COMPRESSIONS)] = "none"
    """As disk_compression, of the values in the shared tier."""
    tier_secret_file: str = ""
    """File with the secret under which fragments outside of a host's memory (on disk, between hosts, in the shared
    tier) are tagged, such as a mounted Kubernetes Secret. Empty: one is drawn at each start, and fragments of earlier
    starts are not used."""
    control: Annotated[str, _CONTROL] = "memory://"
    """Where leases and the block directory live: memory:// (a node process of this cluster) or a redis:// URL."""
    control_password_file: str = ""
    """File with the password of the Redis of `control`, such as a mounted Kubernetes Secret. Empty: the URL has it, or
    there is none."""
    tier_password_file: str = ""
    """The same for `tier`."""
    tier_ttl_s: Annotated[float, Bounds(at_least=1, at_most=10**9)] = 3600.0
    """Seconds after which the shared tier may forget a fragment that was not written again."""
    prefix_fetch: Annotated[str, OneOf(PREFIX_FETCH)] = "cheapest"
    """Whether a worker pulls a prefix that only the tiers have: always, never, or when that is cheaper than computing
    it, by what each worker measured at its start. The KV transfer from prefill to decode is not affected."""

    def __post_init__(self) -> None:
        check_kv_forms(self.kv_encoding, self.kv_cache_dtype)
        if is_redis_cluster(self.control):
            raise ValueError("control: must be one Redis, not a cluster: its scripts change keys of several hash slots")
        check_limits(self)
        if (self.disk_bytes or self.disk_dir) and not self.disk_dir.startswith("/"):
            raise ValueError(f"disk_dir: must be an absolute path where there is a disk tier, not {self.disk_dir!r}")
        try:
            check_peer_transport(self.peer_transport)
        except ValueError as error:
            raise ValueError(f"peer_transport: {error}") from None
        if is_redis_cluster(self.tier):
            redis_cluster_nodes(self.tier)
        for name in ("tier", "control"):
            try:
                check_redis_url(getattr(self, name))
                check_redis_protocol(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            self._check_password_file(name)

    def _check_password_file(self, name: str) -> None:
        url, path = getattr(self, name), getattr(self, f"{name}_password_file")
        if path and not (is_redis(url) or is_redis_cluster(url)):
            raise ValueError(f"{name}_password_file: {name} must be the URL of a Redis, not {url!r}")
        if path and urlsplit(url).password:
            raise ValueError(f"{name}_password_file: the URL of {name} has a password too")

    @property
    def control_url(self) -> str:
        """`control`, with where its password is."""
        return with_password_file(self.control, self.control_password_file)

    @property
    def tier_url(self) -> str:
        """`tier`, with where its password is."""
        return with_password_file(self.tier, self.tier_password_file)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One KV node process: whose it is, its arena, where it listens, and the tiers behind it."""

    node_id: Annotated[str, _NODE_ID]
    """Name of the host in the directory."""
    arena: Path
    """File to make, in a folder that is kept in memory."""
    slot_bytes: Annotated[int, Bounds(more_than=0)]
    """Largest payload of a fragment."""
    num_slots: Annotated[int, Bounds(more_than=0)]
    """Fragments that fit into the arena."""
    host_address: str
    """unix:PATH (or HOST:PORT) for the workers of this host."""
    control_address: str = ""
    """HOST:PORT for the directory; port 0 picks one. Empty: no directory is served."""
    peer_address: str = ""
    """HOST:PORT that other hosts pull from; port 0 picks one. Empty: they pull nothing from here."""
    kvstore: KVStoreConfig = field(default_factory=KVStoreConfig)
    """The `kvstore` branch of the configuration: the disk tier, and by what peers may pull."""
    secret: str = field(default="", repr=False)
    """Of the tiers outside of the host's memory; needed where there is a disk tier, or peers."""
    cluster: str = ""
    """Name of the cluster: callers of others are refused."""

    def __post_init__(self) -> None:
        check_limits(self)
        if (self.kvstore.disk_bytes or self.peer_address) and not self.secret:
            raise ValueError("secret: needed where there is a disk tier, or peers")
        path = (self.host_address.removeprefix(UNIX) + CALLS_SUFFIX).encode()
        if self.host_address.startswith(UNIX) and len(path) > _LONGEST_SOCKET_PATH:
            raise ValueError(f"host_address: longer than {_LONGEST_SOCKET_PATH} bytes: {self.host_address}")


def is_redis(url: str) -> bool:
    """Whether this is the URL of one Redis."""
    return url.startswith(("redis://", "rediss://"))


def is_redis_cluster(url: str) -> bool:
    """Whether this is the URL of a Redis cluster."""
    return url.startswith(("redis+cluster://", "rediss+cluster://"))


def with_password_file(url: str, path: str) -> str:
    """The URL of a Redis with the file that has its password, for kvstore.redis_client: a URL may be printed, and is
    handed to other processes."""
    return f"{url}{'&' if urlsplit(url).query else '?'}{PASSWORD_FILE}={quote(path)}" if path else url


def check_redis_url(url: str) -> None:
    """Raises ValueError when the URL of one Redis has no such port or database as there can be."""
    if not is_redis(url):
        return
    parts = urlsplit(url)
    try:
        is_right = parts.port is None or parts.port > 0
    except ValueError:
        is_right = False
    if not is_right:
        raise ValueError("its port must be a number from 1 to 65535")
    databases = [parts.path.strip("/"), *parse_qs(parts.query).get("db", ())]
    for database in filter(None, databases):
        if not re.fullmatch(r"[0-9]{1,9}", database):
            raise ValueError(f"the database behind the port must be a number, not {database!r}")


def check_redis_protocol(url: str) -> None:
    """Raises ValueError when the URL of a Redis or a cluster asks for another version of its protocol than 2."""
    version = parse_qs(urlsplit(url).query).get("protocol", ["2"])[0]
    if version != "2":
        raise ValueError(f"only version 2 of the Redis protocol is spoken here: leave out ?protocol={version}")


def redis_cluster_nodes(url: str) -> tuple[list[str], Callable[[str], str]]:
    """The HOST:PORT of each node in a cluster's URL, and what makes the URL of one Redis from such an address.

    Raises ValueError for a URL that is none.
    """
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    addresses = [host if host.rpartition("]")[2].count(":") else f"{host}:6379" for host in hosts.split(",")]
    try:
        found = [urlsplit(f"//{address}") for address in addresses]
        is_right = all(node.hostname and node.port for node in found)
    except ValueError:
        is_right = False
    if not is_right or parts.path not in ("", "/", "/0"):
        raise ValueError(
            "tier: a cluster's URL is redis+cluster://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...], without a /db"
        )
    scheme = parts.scheme.removesuffix("+cluster")
    query = f"?{parts.query}" if parts.query else ""
    return addresses, lambda address: f"{scheme}://{user}{at}{address}/0{query}"
