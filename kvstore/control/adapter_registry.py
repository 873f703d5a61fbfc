"""Which adapters a cluster serves, by name: what all its routers must agree on.

`AdapterRegistry` is the seam; a file on one machine, a Redis, and the memory of one process fulfil it. It is a mapping
with one way to change it: what was there is replaced if it is still there. So two routers never both win a name. Knows
nothing of what an adapter is, of who may load one, or of clocks.
"""

import json
import logging
import threading
from dataclasses import asdict, dataclass
from typing import Protocol

log = logging.getLogger(__name__)

_LONGEST_SHOWN = 200  # characters of a damaged record


class RegistryUnavailable(Exception):
    """The registry cannot be reached: nothing is known, and nothing was changed. The message is one line."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter of the cluster."""

    name: str
    """As clients name it, in place of a model."""
    path: str
    """Its directory, absolute, with no links left in it; the same on all hosts."""
    digest: str
    """Of its bytes, in hex; empty while a router reads them."""
    parent: str
    """Name of the model that it was made for."""
    loading_until_s: float = 0.0
    """Seconds since 1970 until which a router may be reading it; 0 once it is read."""
    is_pinned: bool = False
    """Whether its homes keep it on their devices while nobody uses it."""

    def packed(self) -> str:
        """As text; equal for equal records only."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def unpacked(cls, text: str | bytes) -> "AdapterRecord":
        """The reverse of packed(). Raises ValueError for text that is none."""
        try:
            fields = json.loads(text)
            found = cls(**{key: fields[key] for key in cls.__slots__})
            is_whole = all(isinstance(getattr(found, key), str) for key in ("name", "path", "digest", "parent"))
            bytes.fromhex(found.digest)
            float(found.loading_until_s)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"no record of an adapter: {type(error).__name__}") from None
        if not (is_whole and found.name and isinstance(found.is_pinned, bool)):
            raise ValueError("no record of an adapter")
        return found


class RecordReader:
    """Reads records that may be damaged: each of these is logged once, and counts as none."""

    def __init__(self) -> None:
        self._damaged: set[str] = set()

    def read(self, text: str | bytes) -> AdapterRecord | None:
        """None for a damaged record."""
        try:
            return AdapterRecord.unpacked(text)
        except ValueError as error:
            shown = repr(text[:_LONGEST_SHOWN])
            if shown not in self._damaged:
                self._damaged.add(shown)
                log.error("a record of the adapter registry is passed over: %s: %s", error, shown)
            return None


class AdapterRegistry(Protocol):
    """Thread-safe. Every call may raise RegistryUnavailable. A record that is damaged counts as none."""

    def records(self) -> list[AdapterRecord]:
        """All of them, by name."""

    def find(self, name: str) -> AdapterRecord | None:
        """The one of that name."""

    def replace(self, name: str, old: AdapterRecord | None, new: AdapterRecord | None) -> bool:
        """Puts `new` under the name if `old` is there now; None stands for no record. False: something else is there,
        and nothing was changed."""

    def close(self) -> None:
        """Gives up connections. The records stay where they outlive the process."""


class MemoryAdapterRegistry:
    """Of one process: for a router by itself, and for tests."""

    def __init__(self) -> None:
        self._records: dict[str, AdapterRecord] = {}
        self._lock = threading.Lock()

    def records(self) -> list[AdapterRecord]:
        """As in AdapterRegistry."""
        with self._lock:
            return [self._records[name] for name in sorted(self._records)]

    def find(self, name: str) -> AdapterRecord | None:
        """As in AdapterRegistry."""
        with self._lock:
            return self._records.get(name)

    def replace(self, name: str, old: AdapterRecord | None, new: AdapterRecord | None) -> bool:
        """As in AdapterRegistry."""
        with self._lock:
            if self._records.get(name) != old:
                return False
            if new is None:
                self._records.pop(name, None)
            else:
                self._records[name] = new
            return True

    def close(self) -> None:
        """As in AdapterRegistry."""
