"""One adapter's directory: which modules it changes, at what rank, and a digest of what it holds.

Config and tensors are read once, whole: what is checked, digested and used are the same bytes, even where somebody
writes into the directory meanwhile. Knows nothing of the base model: whether names and sizes fit is up to who has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint.adapters.config import CONFIG_NAME, LoraConfig, read_config
from checkpoint.adapters.patterns import MAX_NAME_CHARACTERS
from checkpoint.errors import CheckpointError
from checkpoint.files import parse_json, refuse_pointer

TENSORS_NAME = "adapter_model.safetensors"
DIGEST_BYTES = 32
DTYPES = ("F32", "F16", "BF16")  # that matrices may be stored in, in safetensors' names
MAX_BYTES = 4 << 30  # of the tensors: a file that is larger is no adapter

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # all of its bits are set in NaN and infinity alone
_CHECKED_AT_ONCE = 1 << 20  # elements


@dataclass(frozen=True, slots=True)
class LoraTensor:
    """A matrix, and where its bytes lie in the file of tensors."""

    name: str
    dtype: str  # in safetensors' names
    shape: tuple[int, int]
    begin: int  # first byte, counted from the begin of the file
    end: int  # behind the last byte


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What is added to one linear module: y += scale * B (A x)."""

    name: str
    """In the base model: model.layers.0.self_attn.q_proj."""
    rank: int
    scale: float
    a: LoraTensor
    """[rank, inputs]"""
    b: LoraTensor
    """[outputs, rank]"""

    @property
    def inputs(self) -> int:
        """Columns of the module's matrix."""
        return self.a.shape[1]

    @property
    def outputs(self) -> int:
        """Rows of the module's matrix."""
        return self.b.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a directory holds."""

    directory: Path
    digest: bytes
    """DIGEST_BYTES of every byte of config and tensors."""
    config: LoraConfig
    modules: tuple[LoraModule, ...]
    """By name."""

    @property
    def num_bytes(self) -> int:
        """Of all matrices, as they are stored."""
        return sum(t.end - t.begin for module in self.modules for t in (module.a, module.b))


def read_adapter(directory: Path) -> Adapter:
    """Raises CheckpointError, which names the file and the key or tensor."""
    return open_adapter(directory)[0]


def open_adapter(directory: Path) -> tuple[Adapter, bytes]:
    """The adapter, and the bytes of its file of tensors. Raises CheckpointError."""
    _refuse_other_files(directory)
    config_path, path = directory / CONFIG_NAME, directory / TENSORS_NAME
    raw_config, tensors = _bytes(config_path), _bytes(path)
    config = read_config(parse_json(raw_config, config_path), config_path)
    modules = _modules(_tensors(tensors, path), config, path)
    for module in modules:
        for tensor in (module.a, module.b):
            if not _is_finite(tensor, tensors):
                raise CheckpointError(f"{path}: {tensor.name} holds values that are not finite numbers")
    return Adapter(directory, _digest(raw_config, tensors), config, modules), tensors


def adapter_digest(directory: Path) -> bytes:
    """That of read_adapter, without a check of what the files say. Raises CheckpointError."""
    _refuse_other_files(directory)
    return _digest(_bytes(directory / CONFIG_NAME), _bytes(directory / TENSORS_NAME))


def _digest(config: bytes, tensors: bytes) -> bytes:
    """A cryptographic one: blocks of keys and values are shared by it, also between tenants' machines."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"switchyard lora")
    for content in (config, tensors):
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _refuse_other_files(directory: Path) -> None:
    try:
        is_there = directory.is_dir()
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"{str(directory)[:200]}: {error.strerror}") from None
    if not is_there:
        raise CheckpointError(f"{directory}: no such directory")
    for name in _PICKLES:
        if (directory / name).exists():
            raise CheckpointError(f"{directory / name}: a pickle, which may run code; only {TENSORS_NAME} is read")


def _bytes(path: Path) -> bytes:
    try:
        refuse_pointer(path)
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are more than the {MAX_BYTES} of an adapter")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _tensors(content: bytes, path: Path) -> dict[str, LoraTensor]:
    """By name, from the header: its length (8 bytes, little-endian), JSON, then the tensors' bytes."""
    try:
        data = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:data])
        header.pop("__metadata__", None)
        found = {name: _tensor(name, entry, data) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error})") from None
    for tensor in found.values():
        num_bytes = _ELEMENT_BYTES.get(tensor.dtype)
        if num_bytes is None:
            raise CheckpointError(f"{path}: {tensor.name} is {tensor.dtype}; it must be {' or '.join(DTYPES)}")
        is_whole = tensor.end - tensor.begin == num_bytes * tensor.shape[0] * tensor.shape[1]
        if not is_whole or tensor.begin < data or tensor.end > len(content):
            raise CheckpointError(f"{path}: {tensor.name}: data_offsets reach beyond the file, or do not fit its shape")
    return found


def _tensor(name: str, entry: Mapping[str, object], data: int) -> LoraTensor:
    if not name.isprintable():
        raise ValueError(f"{name!r} is no tensor's name")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise ValueError(f"{name} has neither shape nor place")
    if len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in (*shape, *offsets)):
        raise ValueError(f"{name} is no matrix")
    return LoraTensor(name, str(entry["dtype"]), (shape[0], shape[1]), data + offsets[0], data + offsets[1])


def _is_finite(tensor: LoraTensor, content: bytes) -> bool:
    """With one such value, each request with the adapter would fail, one by one."""
    num_bytes, exponent = _ELEMENT_BYTES[tensor.dtype], _EXPONENTS[tensor.dtype]
    count = (tensor.end - tensor.begin) // num_bytes
    bits = np.frombuffer(content, f"<u{num_bytes}", count, tensor.begin)
    parts = (bits[i : i + _CHECKED_AT_ONCE] for i in range(0, count, _CHECKED_AT_ONCE))
    return not any(bool((part & exponent == exponent).any()) for part in parts)


def _modules(tensors: Mapping[str, LoraTensor], config: LoraConfig, path: Path) -> tuple[LoraModule, ...]:
    names = {_module_of(name, path) for name in tensors}
    if not names:
        raise CheckpointError(f"{path}: no tensors")
    return tuple(_module(name, tensors, config, path) for name in sorted(names))


def _module_of(tensor: str, path: Path) -> str:
    if tensor.startswith(_PREFIX) and tensor.endswith((_A, _B)):
        name = tensor.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        if len(name) > MAX_NAME_CHARACTERS:
            shown = tensor[:MAX_NAME_CHARACTERS]
            raise CheckpointError(f"{path}: {shown}...: a module's name has at most {MAX_NAME_CHARACTERS} characters")
        return name
    kinds = {
        "lora_embedding_": "matrices of an embedding", "lora_magnitude_vector": "a vector of DoRA",
        ".modules_to_save": "a module that is saved whole", ".bias": "a bias", ".base_layer.": "a fused parameter",
    }  # fmt: skip
    kind = next((kind for part, kind in kinds.items() if part in tensor), "no matrix of LoRA")
    raise CheckpointError(f"{path}: {tensor}: {kind}; not supported (only {_PREFIX}MODULE{_A} and {_B} are)")


def _module(name: str, tensors: Mapping[str, LoraTensor], config: LoraConfig, path: Path) -> LoraModule:
    pair = [tensors.get(f"{_PREFIX}{name}{end}") for end in (_A, _B)]
    for tensor, end in zip(pair, (_A, _B), strict=True):
        if tensor is None:
            raise CheckpointError(f"{path}: {_PREFIX}{name}{end}: missing")
    a, b = pair
    assert a is not None
    assert b is not None
    rank = config.rank_of(name)
    if not config.is_target(name):
        raise CheckpointError(f"{path}: {a.name}: {name} is not among target_modules and layers of {CONFIG_NAME}")
    for tensor, stored, what in ((a, a.shape[0], "rows"), (b, b.shape[1], "columns")):
        if stored != rank:
            raise CheckpointError(
                f"{path}: {tensor.name} is {list(tensor.shape)}; by {CONFIG_NAME} its rank is {rank}, so it has {rank}"
                f" {what}"
            )
    return LoraModule(name, rank, config.scale_of(name), a, b)
