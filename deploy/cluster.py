"""Brings a whole cluster up and down: Ray, KV nodes, routers, pools, in an order that lets them start side by side.

What it has started it ends, and nothing else. Knows nothing of terminals and options.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.actors.ray_runtime import RayRuntime, close_ray, open_ray
from deploy.config import ClusterConfig
from deploy.cpu_dtype import fastest_cpu_dtype
from deploy.draft_model import check_draft
from deploy.errors import ConfigError, StartError, one_line
from deploy.host import (
    check_folder,
    check_host_memory,
    check_node_ip,
    check_ports,
    check_ray,
    free_port,
    has_gpu_driver,
    memory_bytes,
)
from deploy.plan import (
    ClusterPlan,
    check_cpu_memory,
    cluster_name,
    layers_per_fragment,
    make_plan,
    model_name,
    num_cpus_needed,
    takes_cpu_dtype,
)
from deploy.ports import wanted_ports
from deploy.preflight import (
    FoundModel,
    check_adapters,
    check_control,
    check_model,
    check_password_files,
    check_peer_transport,
    control_warning,
    disk_warning,
    read_weights,
    tier_secret,
    tier_warning,
)
from deploy.processes.descendants import Descendants
from deploy.processes.leftovers import (
    FOLDER_PREFIX,
    abandoned,
    hold_as_driver,
    hold_folder,
    remove_folder,
    remove_leftovers,
)
from deploy.processes.routers import RouterEndpoint, Routers, first_refusal, router_specs, workers_seen
from deploy.progress import Steps
from kvstore.format.authenticity import cluster_secret
from kvstore.network.addresses import join_host_port
from router.config import RouterSpec
from workers.runtime.compiled.choice import has_libraries, wants_compiled

if TYPE_CHECKING:  # brings ray, which must find the environment that open_ray prepares
    from deploy.actors.kv_nodes import KVNodeSettings

_WORKERS_TIMEOUT_S = 1800.0  # loading a large model takes minutes
_SEEN_TIMEOUT_S = 60.0
_LOOK_S = 0.05
_REMOVAL_ATTEMPTS = 60
_EMPTY = "empty"  # of the run folder: Ray adds the folder in which it is started to its workers' import path


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running cluster is reached."""

    routers: tuple[RouterEndpoint, ...]
    ray_address: str
    dashboard: str
    metrics: str


class Cluster:
    """One cluster. `start` raises DeployError; `stop` may follow any failure."""

    def __init__(self, config: ClusterConfig, steps: Steps) -> None:
        self._config = config
        self._steps = steps
        self._undo: list[Callable[[], None]] = []
        self._keep_logs = False
        self._tier_secret = ""
        self._weights = ""
        self._adapters = config.adapters
        self._started = Descendants()
        self._is_hurried = False
        self._held: list[int] = []
        self.id = secrets.token_hex(4)
        self.run_dir = Path(config.ray.temp_dir) / f"{FOLDER_PREFIX}{self.id}"

    @property
    def stopping(self) -> str:
        """What an orderly end means, for whoever asked for it."""
        drain_s = self._config.router.drain_s
        return f"stopping: streams may go on for {drain_s:g} s (router.drain_s); a second signal stops at once"

    def check(self) -> FoundModel:
        """See whether it can be started, without starting anything. Raises ConfigError or StartError."""
        model = check_model(self._config)
        layers_per_fragment(self._config, model.config.cache_specs)
        self._draft_dir = check_draft(self._config, model)
        self._adapters = check_adapters(self._config, model, model_name(self._config, model.reference))
        check_folder("ray.temp_dir", self._config.ray.temp_dir)
        if not self._config.ray.address:
            check_node_ip(self._config.ray.node_ip)
        check_ports(self._config.endpoints, self._config.ray)
        check_password_files(self._config.kvstore)
        check_control(self._config.kvstore.control_url, self._name(model))
        check_peer_transport(self._config.kvstore)
        secret = tier_secret(self._config.kvstore.tier_secret_file)
        self._tier_secret = cluster_secret(secret, self._name(model))
        if self._config.ray.address:
            check_ray(self._config.ray.address)
        else:
            check_host_memory("kvstore.host_bytes", self._config.kvstore.host_bytes)
            check_host_memory("ray.object_store_bytes", self._config.ray.object_store_bytes)
            check_cpu_memory(self._config, model.config, memory_bytes(), has_gpu_driver())
        check_folder("kvstore.arena_dir", self._config.kvstore.arena_dir)
        return model

    def _name(self, model: FoundModel) -> str:
        host = f"{socket.gethostname()}/{uuid.getnode():x}/{_machine_id()}"
        return cluster_name(self._config, model.reference, host, self.id)

    def start(self) -> Endpoints:
        """Bring everything up; returns when all workers can be reached through all routers."""
        remove_leftovers(Path(self._config.ray.temp_dir))  # they may hold what is checked now
        model = self.check()
        kvstore = self._config.kvstore
        for warning in (tier_warning(kvstore.tier_url), disk_warning(kvstore), control_warning(kvstore)):
            if warning:
                self._steps.note(f"warning: {warning}")
        with self._steps.step("Reading the weights"):  # a digest is remembered: quick from the second start on
            self._weights = read_weights(self._config, model)
        self._make_run_dir()
        self._undo.append(self._started.kill)
        with self._steps.step(self._ray_step()), contextlib.chdir(self.run_dir / _EMPTY):
            self._undo.append(close_ray)
            cpus, ports = num_cpus_needed(self._config), wanted_ports(self._config.endpoints, self._config.ray)
            reserved = {port for wanted in ports for port in wanted.ports}
            ray = open_ray(self._config.ray, cpus, self.run_dir / "ray", reserved)
        return self._start_on(ray, model)

    def stop(self, keep_logs: bool = False) -> None:
        """End what was started, last things first. What fails to end does not keep the rest."""
        self._keep_logs = keep_logs
        undo, self._undo = self._undo, []
        for action in reversed(undo):
            try:
                action()
            except Exception as error:
                self._steps.note(f"warning: a part of the cluster did not end as it should: {one_line(error)}")

    def end_at_once(self) -> bool:
        """Kill what was started and remove its files, whatever `start` or `stop` are doing in another thread.

        False: `stop` has to go on, since a Ray cluster that is not ours runs the rest; no streams are left to wait for.
        """
        is_first, self._is_hurried = not self._is_hurried, True
        self._started.kill()
        if self._config.ray.address and is_first:
            return False
        with contextlib.suppress(OSError):
            remove_folder(self.run_dir)
        return True

    def _make_run_dir(self) -> None:
        self._undo.append(self._remove_run_dir)
        try:
            self._held.append(hold_folder(self.run_dir))
            self._held.append(hold_as_driver(self.run_dir, self._config.pools))
            (self.run_dir / _EMPTY).mkdir()
        except OSError as error:
            raise ConfigError(f"ray.temp_dir: {self._config.ray.temp_dir}: {error.strerror or error}") from None

    def _remove_run_dir(self) -> None:
        """Some of Ray's processes still write while they end. Kept for its logs, it goes at the next start."""
        for _ in range(0 if self._keep_logs else _REMOVAL_ATTEMPTS):
            with contextlib.suppress(OSError):
                remove_folder(self.run_dir)
            if not self.run_dir.exists():
                break
            time.sleep(_LOOK_S)
        while self._held:
            os.close(self._held.pop())

    def _ray_step(self) -> str:
        return f"Joining Ray at {self._config.ray.address}" if self._config.ray.address else "Starting Ray"

    def _start_on(self, ray: RayRuntime, model: FoundModel) -> Endpoints:
        # These import ray, which must find the environment that open_ray has prepared.
        from deploy.actors.kv_nodes import KVNodeSettings, describe, kv_node_on, stop_kv_nodes
        from deploy.actors.pools import check_capacity, close_serve, deploy_pools, open_serve, wait_running

        if not ray.was_started:
            self._end_abandoned()
        control, control_address = self._control(ray)
        cpu_dtype = "float32"
        if takes_cpu_dtype(self._config, ray.num_gpus):
            cpu_dtype = fastest_cpu_dtype(model.directory, self._steps.note)
        plan = make_plan(
            self._config,
            model.config,
            model.reference,
            ray.num_gpus,
            control,
            self._tier_secret,
            self._name(model),
            cpu_dtype,
            self._draft_dir,
        )
        short = check_capacity(plan.pools)
        if short and ray.was_started:
            raise ConfigError(short)
        if short:
            self._steps.note(f"warning: {short}; waiting for it to grow")
        settings = KVNodeSettings(
            cluster_id=self.id,
            cluster=plan.cluster,
            run_dir=str(self.run_dir),
            arena=plan.arena,
            control_node_id=ray.node_id if control_address else "",
            control_address=control_address,
            kvstore=self._config.kvstore,
            secret=self._tier_secret,
        )
        names, deployed = [pool.name for pool in plan.pools], list[str]()
        with self._steps.step("Starting the KV node, routers and pools"):
            self._undo.append(lambda: stop_kv_nodes(self.id, self._keep_logs))
            described = describe(kv_node_on(ray.node_id, settings))
            serve_was_started = open_serve()
            if not ray.was_started:  # otherwise all ends with Ray
                self._undo.append(lambda: close_serve(deployed, serve_was_started))
            deploy_pools(plan.pools, settings)
            deployed += names
            routers = self._start_routers(plan, model)  # last to start, first to end: they let streams run out
        with self._steps.step("Waiting for the KV node and routers"):
            self._check_node(described, settings)
            endpoints = routers.wait_ready()
        engines = [pool.spec.engine for pool in plan.pools if pool.spec.engine.device == "cpu"]
        with self._steps.step("Waiting for the workers"):
            if any(wants_compiled(engine, model.config.hidden_size) for engine in engines) and not has_libraries():
                self._steps.note("layers are compiled for this processor (engine key `compile`): about a minute, once")
            wait_running(plan.pools, _WORKERS_TIMEOUT_S, self._steps.note)
            self._wait_seen(plan, endpoints)
        return Endpoints(tuple(endpoints), ray.address, ray.dashboard, ray.metrics)

    def _end_abandoned(self) -> None:
        """Take clusters out of this Ray whose drivers on this host were killed: no other process ends their parts."""
        from deploy.actors.kv_nodes import has_kv_nodes, stop_kv_nodes
        from deploy.actors.pools import close_serve

        temp_dir = Path(self._config.ray.temp_dir)
        for left in abandoned(temp_dir):
            if has_kv_nodes(left.cluster_id):
                self._steps.note(f"ending cluster {left.cluster_id}, whose driver was killed")
                close_serve(left.pools, False)
                stop_kv_nodes(left.cluster_id, keep_logs=False)
        remove_leftovers(temp_dir)

    def _control(self, ray: RayRuntime) -> tuple[str, str]:
        """URL of the control service, and the address that our KV node is to serve it on ("": it is elsewhere)."""
        url = self._config.kvstore.control_url
        if url != "memory://":
            return url, ""
        address = join_host_port(ray.node_ip, free_port(ray.node_ip))
        return f"memory://{address}", address

    def _start_routers(self, plan: ClusterPlan, model: FoundModel) -> Routers:
        control = plan.pools[0].spec.control
        # In memory, what the routers of one machine share is written down in files that outlive them.
        in_files = control.startswith("memory://")
        journal = f"file://{self.run_dir}/streams.journal" if in_files else control
        template = RouterSpec(
            "",
            str(model.directory),
            plan.model_name,
            control,
            journal,
            cluster=plan.cluster,
            weights=self._weights,
            ignore_keys=self._config.model.ignore_keys,
            model_limits=model.limits,
            generation_config=self._config.model.generation_config,
            adapters=self._adapters,
            adapter_targets=model.adapter_targets if self._adapters.enabled else (),
            adapter_registry=f"file://{self.run_dir}/adapters.registry" if in_files else control,
        )
        specs = router_specs(template, self._config.endpoints, self._config.router, self.id)
        routers = Routers(specs, self.run_dir)
        self._undo.append(lambda: routers.stop(self._config.router.drain_s + 2.0))
        routers.start()
        return routers

    def _check_node(self, described: Any, settings: KVNodeSettings) -> None:
        import ray

        try:
            node = ray.get(described)
        except ray.exceptions.RayError as error:
            raise StartError(one_line(error)) from None
        arena = settings.arena
        if node.num_slots < arena.num_slots:
            mib = node.num_slots * arena.slot_bytes >> 20
            self._steps.note(f"warning: {arena.folder} and memory have space for {mib} MiB of KV blocks only")

    def _wait_seen(self, plan: ClusterPlan, endpoints: list[RouterEndpoint]) -> None:
        """Return when every router has found all workers."""
        wanted = {pool.name: pool.replicas for pool in plan.pools}
        deadline_s = time.monotonic() + _SEEN_TIMEOUT_S
        for endpoint in endpoints:
            while any(workers_seen(endpoint).get(name, 0) < count for name, count in wanted.items()):
                if time.monotonic() > deadline_s:
                    why = f": {refusal}" if (refusal := first_refusal(endpoint)) else ""
                    raise StartError(f"the workers serve, but the router at {endpoint.http} does not see them all{why}")
                time.sleep(_LOOK_S)


def _machine_id() -> str:
    """systemd's name of this machine; "" where it has none."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
