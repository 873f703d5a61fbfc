"""The `adapters` branch of the configuration. Knows the fields and their ranges, not what reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from settings.limits import Bounds, Matches, check_limits

_ABSOLUTE = Matches(r"(/.*)?", "an absolute path")


@dataclass(frozen=True, slots=True)
class AdaptersConfig:
    """LoRA adapters of the model, in PEFT's layout. An adapter's name is a model name to clients."""

    enabled: bool = False
    """Whether workers take requests with adapters: vLLM's enable_lora. Costs memory for the slots."""
    modules: dict[str, str] = field(default_factory=dict)
    """Adapters to serve from the start: directories by name. The directories have the same path on all hosts. They
    cannot be unloaded while the cluster runs: a router that restarts would bring them back."""
    pinned: tuple[str, ...] = ()
    """Names of those modules that stay on the devices of the workers that their requests go to, also while there are
    none."""
    root: Annotated[str, _ABSOLUTE] = ""
    """Directory below which /v1/load_lora_adapter and LoadAdapter find adapters; it has the same path on all hosts.
    Whoever reaches a router may load what is there. Empty means that none are loaded while the cluster runs."""
    max_loras: Annotated[int, Bounds(at_least=1, at_most=4096)] = 16
    """Adapters on a worker's device at a time: most different ones in one step. Their memory is taken at the start: for
    every linear module of the model, and for every expert of a mixture in floating point."""
    max_lora_rank: Annotated[int, Bounds(at_least=1, at_most=512)] = 16
    """Largest rank of an adapter; larger ones are refused. On cuda each takes memory and time as if it had this one."""
    max_cpu_loras: Annotated[int, Bounds(at_least=0, at_most=65536)] = 0
    """Adapters in a worker's host memory, those on the device included; 0 means four times max_loras."""
    load_timeout_s: Annotated[float, Bounds(more_than=0)] = 60.0
    """How long a request waits for its adapter: until a router has checked it, and until a worker has read it, from
    its arrival there. A rank reads at most eight adapters at a time; others wait their turn within that time."""
    load_ms: Annotated[float, Bounds(at_least=0)] = 100.0
    """What the cost model takes for reading an adapter that a worker does not hold."""
    copy_ms: Annotated[float, Bounds(at_least=0)] = 5.0
    """What it takes for copying one from the host's memory to the device."""

    def __post_init__(self) -> None:
        check_limits(self)
        for key in ("modules", "root"):
            if getattr(self, key) and not self.enabled:
                raise ValueError(f"{key}: needs enabled=true")
        if unknown := [name for name in self.pinned if name not in self.modules]:
            raise ValueError(f"pinned: {unknown[0]!r} is not in modules")
        if 0 < self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras: must be 0 or at least max_loras={self.max_loras}, not {self.max_cpu_loras}"
            )
