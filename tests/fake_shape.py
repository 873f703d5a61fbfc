"""What a fake cluster is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvstore.config import KVStoreConfig
from tests.fake_model import MODEL_NAME
from tests.forked import SECRET
from workers.config import EngineConfig, WorkerSpec

NUM_BLOCKS = 1024  # of a worker


@dataclass(frozen=True)
class Shape:
    """What a fake cluster is made of."""

    prefill: int = 2
    decode: int = 2
    mixed: int = 0
    routers: int = 2
    step_s: float = 0.0
    token_s: float = 0.0
    control: str = ""  # empty: the node's directory
    tier: str = ""  # empty: the node's arena alone
    uses_arena: bool = True
    hosts: int = 1  # KV nodes; prefill and decode workers of one number are on different ones
    peers: bool = False  # whether hosts pull from each other
    peer_transport: str = "tcp"
    disk_bytes: int = 0  # of each node; 0: no disk tier
    disk_dir: str = ""  # empty: in the cluster's folder
    silent: tuple[str, ...] = ()  # workers that the directory does not list, nor what they publish
    journal: str = ""  # empty: a file
    block_size: int = 4
    num_slots: int = 8192
    engine: dict[str, object] = field(default_factory=dict)  # of EngineConfig
    engine_of: dict[str, dict[str, object]] = field(default_factory=dict)  # the same for one role or worker alone
    router: dict[str, object] = field(default_factory=dict)  # of RouterConfig
    adapters_root: str = ""  # where adapters are loaded from; empty: none are served
    sizes: dict[str, int] = field(default_factory=dict)  # of the model
    cluster: str = ""  # its name
    model_name: str = MODEL_NAME
    secret: str = SECRET  # of the tiers
    model_dir: str = ""  # of a real model, for the real engine; empty: one for the fake engine is made

    @property
    def roles(self) -> dict[str, int]:
        """Workers by role."""
        return {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}

    def worker_spec(self, model_dir: Path, name: str, worker_id: str) -> WorkerSpec:
        """Of a worker that is called ROLE-NUMBER; its addresses are left open."""
        role = name.partition("-")[0]
        settings = {
            "dtype": "float32",
            "device": "cpu",
            "block_size": self.block_size,
            "num_blocks": NUM_BLOCKS,
            "runner": "fake",
            "fake_step_s": self.step_s,
            "fake_token_s": self.token_s,
            "enable_lora": bool(self.adapters_root),
            "compile": False,  # it takes a minute where it was not done before
            **self.engine,
            **self.engine_of.get(role, {}),
            **self.engine_of.get(name, {}),
        }
        return WorkerSpec(
            worker_id=worker_id,
            pool=role,
            role=role,
            engine=EngineConfig(str(model_dir), **settings),
            model_name=self.model_name,
            cluster=self.cluster,
            kvstore=KVStoreConfig(
                tier=self.tier,
                peers=self.peers,
                peer_transport=self.peer_transport,
                prefix_fetch="always",  # no probe at the start, and whatever may be pulled is pulled
            ),
            tier_secret=self.secret if self.tier or self.peers else "",
            layers_per_fragment=1,
        )
