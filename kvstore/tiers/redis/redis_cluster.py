"""The shared tier in a Redis cluster: each fragment on the node that its key's hash slot belongs to.

Every node of the cluster is a tier of its own (kvstore.tiers.redis.redis_tier) with its own connections, and a batch
goes to all of them at once. One that is away costs its fragments alone. A thread reads the owners of slots every
second; a fragment that a node refuses because its slot has moved is tried once more at the owner that it names, if that
is known already. Knows nothing of what is kept.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvstore.config import redis_cluster_nodes
from kvstore.format.fragment import Fragment, Rejected
from kvstore.network.availability import Availability
from kvstore.redis_client import NUM_HASH_SLOTS, REDIS_ERRORS, RedisClient, connect, hash_slot, slot_owners
from kvstore.tiers.redis.redis_tier import RedisTier, key_prefix_of

_MOST_NODES_AT_ONCE = 16
_RETIRED_S = 60.0  # longer than any call to a node takes

_Result = TypeVar("_Result")


class RedisClusterTier:
    """A client of the cluster that any of the nodes in `url` belongs to: redis+cluster://HOST:PORT,HOST:PORT."""

    name = "redis"

    def __init__(self, url: str, secret: str, ttl_s: float = 3600.0, compression: str = "none") -> None:
        """As RedisTier. Raises ValueError for a URL that is none."""
        seeds, self._node_url = redis_cluster_nodes(url)
        self.key_prefix = key_prefix_of(secret)
        self._tier_of: Callable[[str], RedisTier] = lambda address: RedisTier(
            self._node_url(address), secret, ttl_s, compression, is_cluster_node=True
        )
        self._seeds = seeds
        # What follows until _clients is replaced whole, so that readers need no lock. Nobody waits for a node under it.
        self._lock = threading.Lock()
        self._owners: tuple[str, ...] = ("",) * NUM_HASH_SLOTS  # HOST:PORT by slot; empty: no owner
        self._nodes: dict[str, RedisTier] = {}  # by HOST:PORT; only _look replaces it
        self._named: frozenset[str] = frozenset()  # HOST:PORT of owners that nodes named since the last _look
        self._clients: dict[str, RedisClient] = {}  # of _look: that are asked who owns what, by HOST:PORT
        self._retired: list[tuple[float, RedisTier]] = []  # of _look
        self._threads = ThreadPoolExecutor(_MOST_NODES_AT_ONCE, "kv-redis-node")
        self._availability = Availability(f"redis cluster at {','.join(seeds)}", self._look, self._look, REDIS_ERRORS)

    @property
    def is_up(self) -> bool:
        """As in Tier: whether any node answers."""
        return self._availability.is_up and any(node.is_up for node in self._nodes.values())

    @property
    def problem(self) -> str:
        """As in Tier: of the first node that has one."""
        nodes = self._nodes
        ours = (f"{address}: {node.problem}" for address, node in nodes.items() if node.problem)
        return self._availability.problem or next(ours, "" if nodes else "no node answers")

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        """As in Tier."""
        keys = [fragment.key for fragment in fragments]
        return self._at_owners(keys, lambda node, batch: node.store([fragments[i] for i in batch]), False)

    def load(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        """As in Tier."""
        return self._at_owners(keys, lambda node, batch: list(node.load([keys[i] for i in batch])), None)

    def close(self) -> None:
        """As in Tier."""
        self._availability.close()
        self._threads.shutdown()
        for node in (*self._nodes.values(), *(node for _, node in self._retired)):
            node.close()
        for client in self._clients.values():
            client.close()

    def _at_owners(
        self, keys: Sequence[bytes], call: Callable[[RedisTier, list[int]], Sequence[_Result]], nothing: _Result
    ) -> list[_Result]:
        """What the call gives for each key at its slot's owner; what a former owner refused, again at the new one."""
        results = [nothing] * len(keys)
        if not self.is_up or not keys:
            return results
        slots = [hash_slot(self.key_prefix + key) for key in keys]
        owners = self._owners
        self._ask(owners, slots, range(len(keys)), call, results)
        now = self._follow()
        if now is not owners:  # also when another call has taken what nodes said to this one
            moved = [i for i, slot in enumerate(slots) if now[slot] != owners[slot] and results[i] is nothing]
            self._ask(now, slots, moved, call, results)
        return results

    def _ask(
        self,
        owners: Sequence[str],
        slots: Sequence[int],
        wanted: Sequence[int],
        call: Callable[[RedisTier, list[int]], Sequence[_Result]],
        results: list[_Result],
    ) -> None:
        """All owners at once, each for its keys in one batch."""
        nodes, batches = self._nodes, dict[str, list[int]]()
        for i in wanted:
            if owners[slots[i]] in nodes:
                batches.setdefault(owners[slots[i]], []).append(i)
        # The last one in this thread: a cluster of one node needs no other.
        *others, last = batches.items() if batches else [("", [])]
        asked = [(batch, self._threads.submit(call, nodes[address], batch)) for address, batch in others]
        if last[1]:
            _set_at(results, last[1], call(nodes[last[0]], last[1]))
        for batch, answer in asked:
            _set_at(results, batch, answer.result())

    def _follow(self) -> tuple[str, ...]:
        """Takes the owners that nodes have named: others may learn of a slot's move later than its former owner.

        One that is not known yet is left to _look: a load waits for no new node.
        """
        with self._lock:
            named: dict[int, str] = {}
            for node in self._nodes.values():
                named |= node.take_redirections()
            if named:
                owners = list(self._owners)
                for slot, address in named.items():
                    if address in self._nodes:
                        owners[slot] = address
                self._owners = tuple(owners)
                self._named |= set(named.values())
            return self._owners

    def _look(self) -> None:
        """Asks which node owns which slots. Raises one of REDIS_ERRORS when none answers. For one thread."""
        owners = self._ask_owners()
        with self._lock:
            named, self._named = self._named, frozenset()
        addresses = {*owners, *named} - {""}
        known = self._nodes
        nodes = {address: known.get(address) or self._tier_of(address) for address in sorted(addresses)}
        with self._lock:
            self._nodes = nodes  # before the owners, so that every address there has its node
            self._owners = owners
        now_s = time.monotonic()
        self._retired += [(now_s, node) for address, node in known.items() if address not in addresses]
        while self._retired and self._retired[0][0] < now_s - _RETIRED_S:
            self._retired.pop(0)[1].close()
        for address in self._clients.keys() - addresses - set(self._seeds):
            self._clients.pop(address).close()

    def _ask_owners(self) -> tuple[str, ...]:
        """By the first that answers: those that were up before, then the seeds."""
        up = [address for address, node in self._nodes.items() if node.is_up]
        error: Exception = OSError("no node of the cluster is known")
        for address in dict.fromkeys((*up, *self._seeds)):
            client = self._clients.get(address)
            if client is None:
                client = self._clients[address] = connect(self._node_url(address))
            try:
                return slot_owners(client, address)
            except REDIS_ERRORS as failed:
                error = failed
        raise error


def _set_at(results: list[_Result], indices: Sequence[int], answers: Sequence[_Result]) -> None:
    for i, answer in zip(indices, answers, strict=True):
        results[i] = answer
