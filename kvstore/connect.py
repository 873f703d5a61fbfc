"""Directories, journals and tiers from the addresses that the configuration has.

Nothing is raised because the other end is away: tiers are down then, and a directory says so when it is asked. Knows
nothing of who starts the other ends.
"""

import time
from collections.abc import Callable
from pathlib import Path

from kvstore.config import KVStoreConfig, is_redis, is_redis_cluster
from kvstore.control.adapter_registry import AdapterRegistry, MemoryAdapterRegistry
from kvstore.control.directory import Directory
from kvstore.control.file_adapter_registry import FileAdapterRegistry
from kvstore.control.file_journal import FileJournal
from kvstore.control.journal import StreamJournal
from kvstore.control.redis_adapter_registry import RedisAdapterRegistry
from kvstore.control.redis_directory import RedisDirectory
from kvstore.control.redis_journal import RedisJournal
from kvstore.control.remote_directory import RemoteDirectory
from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.peers.peer_tier import PEER_LOCATION, PeerTier
from kvstore.tiers.peers.transport import Transport
from kvstore.tiers.redis.redis_cluster import RedisClusterTier
from kvstore.tiers.redis.redis_tier import RedisTier
from kvstore.tiers.tier import Tier

_MEMORY = "memory://"
_FILE = "file://"


def open_directory(url: str, cluster: str) -> Directory:
    """memory://HOST:PORT (or memory://unix:PATH) is a node process's directory, redis://... one in a Redis.

    cluster: whose leases and blocks; those of others are not seen.
    """
    if url.startswith(_MEMORY):
        address = url.removeprefix(_MEMORY)
        if not address:
            raise ValueError("control: memory:// needs the HOST:PORT of a node process here")
        return RemoteDirectory(address, cluster)
    if is_redis(url):
        return RedisDirectory(url, cluster)
    raise ValueError(f"control: must be memory://HOST:PORT or a redis:// URL, not {url!r}")


def open_journal(url: str, cluster: str) -> StreamJournal:
    """file:///PATH is a file that the routers of one machine share, redis://... one in a Redis, apart for each cluster.

    Raises JournalUnavailable when the file cannot be opened.
    """
    if url.startswith(_FILE):
        path = Path(url.removeprefix(_FILE))
        if not path.is_absolute():
            raise ValueError(f"journal: file:// needs an absolute path, not {str(path)!r}")
        return FileJournal(path, time.time)
    if is_redis(url):
        return RedisJournal(url, cluster)
    raise ValueError(f"journal: must be file:///PATH or a redis:// URL, not {url!r}")


def open_adapter_registry(url: str, cluster: str) -> AdapterRegistry:
    """file:///PATH is a file that the routers of one machine share, redis://... one in a Redis, apart for each cluster;
    memory:// is this process's own.

    Raises RegistryUnavailable when the file cannot be opened.
    """
    if url == _MEMORY:
        return MemoryAdapterRegistry()
    if url.startswith(_FILE):
        path = Path(url.removeprefix(_FILE))
        if not path.is_absolute():
            raise ValueError(f"adapters: file:// needs an absolute path, not {str(path)!r}")
        return FileAdapterRegistry(path)
    if is_redis(url):
        return RedisAdapterRegistry(url, cluster)
    raise ValueError(f"adapters: must be memory://, file:///PATH or a redis:// URL, not {url!r}")


def open_tiers(
    host_address: str, store: KVStoreConfig, secret: str = "", control: str = "", cluster: str = ""
) -> list[Tier]:
    """The tiers of a worker in the order in which they are asked; without host_address there is no host tier.

    secret: of tiers outside the host's memory. control: URL of the directory in which peers are found. Raises
    ValueError for a tier outside the host without a secret; ImportError or OSError when NIXL is asked for and does not
    work here.
    """
    tiers: list[Tier] = []
    host = HostTier(host_address, cluster) if host_address else None
    if host is not None:
        tiers.append(host)
    if store.peers and control:
        directory = open_directory(control, cluster)
        connect = _connect_by_nixl(secret) if store.peer_transport == "nixl" else None
        tiers.append(PeerTier(directory, secret, lambda: host.peer_address if host is not None else "", connect))
    if store.tier:
        make = RedisClusterTier if is_redis_cluster(store.tier) else RedisTier
        tiers.append(make(store.tier_url, secret, store.tier_ttl_s, store.tier_compression))
    return tiers


def _connect_by_nixl(secret: str) -> Callable[[str], Transport]:
    from kvstore.tiers.peers.nixl_transport import (  # seconds, and a package that most do without
        NixlReader,
        NixlTransport,
    )

    authenticator, reader = FragmentAuthenticator(secret), NixlReader()
    return lambda address: NixlTransport(address, authenticator, reader)


def locations_of(tier: Tier, node_id: str) -> list[str]:
    """The locations under which blocks in this tier are published in the directory."""
    if isinstance(tier, PeerTier):
        return []
    if not isinstance(tier, HostTier):
        return [tier.name]
    address = tier.peer_address
    return [f"host:{node_id}", *([PEER_LOCATION + address] if address else [])]


def reaches(tier: Tier, node_id: str, locations: frozenset[str]) -> bool:
    """Whether this tier may find a block that the directory says is in these locations."""
    if isinstance(tier, PeerTier):
        return any(location.startswith(PEER_LOCATION) for location in locations)
    if isinstance(tier, HostTier):
        return f"host:{node_id}" in locations
    return tier.name in locations
