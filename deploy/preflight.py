"""Checks what can be checked before anything is started: a wrong option costs a line and not a half-built cluster.

Knows nothing of Ray. What only shows itself later (a worker that cannot load) is reported by `cluster`.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from deploy.config import DEMO_MODEL, ClusterConfig
from deploy.errors import ConfigError, StartError
from kvstore.config import KVStoreConfig, is_redis
from kvstore.redis_client import read_password
from kvstore.trial import TierMisconfigured, memory_risk, try_control, try_disk, try_tier
from router.adapters.config import AdaptersConfig
from router.adapters.files import read_fitting
from router.adapters.targets import AdapterTarget, targets_of
from router.errors import AdapterRefused, ModelFilesError
from router.model_files import ModelFiles, ModelLimits
from router.service.chat import ChatTemplate
from router.service.text import TextCodec
from workers.config import resolve_model
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.identity import weights_identity
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint, check_split, tensor_layout

_LEAST_SECRET_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The model to serve, as this machine sees it."""

    reference: str
    """The same for workers on other hosts: an absolute path, the name of a packaged model, or a Hub id."""
    directory: Path
    config: ModelConfig

    @property
    def limits(self) -> ModelLimits:
        """The parts of its config that routers need."""
        return ModelLimits(self.config.max_position_embeddings, self.config.vocab_size)

    @property
    def adapter_targets(self) -> tuple[AdapterTarget, ...]:
        """The linear modules that adapters may change."""
        matrices = tensor_layout(self.config).matrices
        return targets_of({name: (size, one.inputs) for one in matrices for name, size in one.tensors()})


def find_model(config: ClusterConfig) -> FoundModel:
    """The model that the configuration names. Raises ConfigError."""
    wanted = config.model.path or str(DEMO_MODEL)
    try:
        directory = resolve_model(wanted).resolve()
        model = load_config(directory, config.model.ignore_keys, config.model.plugins)
    except (ModelError, ModelFilesError) as error:
        raise ConfigError(str(error)) from None
    path = Path(wanted).expanduser()
    return FoundModel(str(path.resolve()) if path.exists() else wanted, directory, model)


def check_model(config: ClusterConfig) -> FoundModel:
    """Find the model, see that all of its files are whole and understood, and that each pool can split it.

    Raises ConfigError.
    """
    model = find_model(config)
    try:
        _check_texts(model.directory, config, model.limits)
        if config.engine.runner != "fake":
            check_checkpoint(model.directory, model.config)
    except (ModelError, ModelFilesError) as error:
        raise ConfigError(str(error)) from None
    for name, pool in config.pools.items():
        try:
            check_split(model.config, pool.tp, pool.pp)
        except ModelError as error:
            raise ConfigError(f"pools.{name}: {error}") from None
    return model


def check_adapters(config: ClusterConfig, model: FoundModel, name: str) -> AdaptersConfig:
    """See that the adapters to serve from the start can be served, and that the folder for later ones is there. name:
    what clients call the model. The branch with absolute paths. Raises ConfigError."""
    adapters = config.adapters
    if adapters.root and not os.path.isdir(adapters.root):
        raise ConfigError(f"adapters.root: {adapters.root}: no such folder")
    modules = {}
    targets = model.adapter_targets if adapters.modules else ()
    for module, path in adapters.modules.items():
        key, directory = f"adapters.modules.{module}", Path(path).expanduser().resolve()
        if not module or module == name:
            raise ConfigError(
                f"adapters.modules: {module!r} cannot be the name of an adapter: it is the model's, or none"
            )
        try:
            read_fitting(directory, targets, adapters.max_lora_rank, key)
        except AdapterRefused as error:
            raise ConfigError(error.message) from None
        modules[module] = str(directory)
    return dataclasses.replace(adapters, modules=modules)


def read_weights(config: ClusterConfig, model: FoundModel) -> str:
    """What tells the model from others: every byte of its weights is read, unless it was before. Raises ConfigError."""
    try:
        return weights_identity(model.directory, model.config, config.engine.runner)
    except ModelError as error:
        raise ConfigError(str(error)) from None


def _check_texts(directory: Path, config: ClusterConfig, limits: ModelLimits) -> None:
    """Whatever a router reads of the model: tokenizer, chat template, defaults. Raises ModelFilesError."""
    files = ModelFiles.load(directory, directory.name, config.model.generation_config, config.model.ignore_keys, limits)
    TextCodec(files.tokenizer_json)
    if files.chat_template:
        ChatTemplate(files.chat_template, files.special_tokens, files.chat_template_where)


def check_password_files(kvstore: KVStoreConfig) -> None:
    """See that the passwords of both Redis servers can be read. Raises ConfigError."""
    for key in ("control_password_file", "tier_password_file"):
        path = getattr(kvstore, key)
        try:
            password = read_password(path) if path else "none"
        except ValueError as error:
            raise ConfigError(f"kvstore.{key}: {error}") from None
        if not password:
            raise ConfigError(f"kvstore.{key}: {path}: is empty")


def check_control(url: str, cluster: str) -> None:
    """See that a Redis that is to hold leases, the directory and the journal does that. Raises DeployError."""
    if not is_redis(url):
        return
    try:
        problem = try_control(url, cluster)
    except TierMisconfigured as error:
        raise ConfigError(f"kvstore.control: {error}") from None
    if problem:
        raise StartError(f"kvstore.control: {problem}")


def tier_secret(path: str) -> str:
    """The secret of the shared tier: from a file, or a new one. Raises ConfigError."""
    if not path:
        return secrets.token_hex(32)
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"kvstore.tier_secret_file: {path}: {why}") from None
    if len(secret) < _LEAST_SECRET_CHARACTERS:
        raise ConfigError(
            f"kvstore.tier_secret_file: {path}: has {len(secret)} characters, {_LEAST_SECRET_CHARACTERS} are the least"
        )
    return secret


def tier_warning(url: str) -> str:
    """One line when the shared tier does not do what it will be asked for now, else "". The cluster runs without it,
    and finds it later. Raises ConfigError where that would never happen."""
    try:
        problem = try_tier(url) if url else ""
    except TierMisconfigured as error:
        raise ConfigError(f"kvstore.tier: {error}") from None
    return f"kvstore.tier: {problem}; serving without this tier until it answers" if problem else ""


def control_warning(kvstore: KVStoreConfig) -> str:
    """One line when a full Redis could take the leases, and with them all workers; else ""."""
    if not is_redis(kvstore.control):
        return ""
    risk = memory_risk(kvstore.control_url, kvstore.tier_url)
    return f"kvstore.control: {risk}; give it a Redis of its own without a limit" if risk else ""


def check_peer_transport(kvstore: KVStoreConfig) -> None:
    """See that the package of the peers' transport is installed. Raises ConfigError."""
    if kvstore.peers and kvstore.peer_transport == "nixl" and find_spec("nixl") is None:
        raise ConfigError("kvstore.peer_transport: nixl is not installed (pip install 'switchyard[nixl]')")


def disk_warning(kvstore: KVStoreConfig) -> str:
    """One line when this host's disk tier cannot be kept where it should be now, else "". Raises ConfigError where it
    never could."""
    try:
        problem = try_disk(Path(kvstore.disk_dir)) if kvstore.disk_bytes else ""
    except TierMisconfigured as error:
        raise ConfigError(f"kvstore.disk_dir: {error}") from None
    return f"kvstore.disk_dir: {problem}; serving without this tier until it is free" if problem else ""
