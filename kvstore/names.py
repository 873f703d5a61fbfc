"""Names of KV blocks and keys of their fragments.

A block's name is a chained hash of all that its bytes depend on: the fingerprint of model and cache layout, the
tenant's salt, the adapter's digest, the parent block and the block's own tokens. Equal names mean equal contents,
wherever computed.
Pure; does not know where blocks are kept, nor how a device lays them out.
"""

import hashlib
import json
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence

NAME_BYTES = 16
FRAGMENT_KEY_BYTES = 22

_FRAGMENT_KEY = struct.Struct("<16sHHH")


def fingerprint(fields: Mapping[str, object]) -> bytes:
    """16 bytes that differ when any field differs; the order of the fields does not matter.

    Fields are what the bytes of a block depend on (model, dtype, RoPE, layers, heads, head_dim, block size), never tp,
    pp or a device layout: workers that split the model differently still exchange blocks.
    """
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _digest(b"kv-fingerprint", canonical.encode())


def root_name(fingerprint: bytes, tenant_salt: bytes, adapter_digest: bytes = b"") -> bytes:
    """Parent of the first block of every prompt of one tenant under one fingerprint.

    adapter_digest: of the bytes of the adapter that the prompt is computed with; empty: with none.
    """
    fixed = struct.pack("<I", len(fingerprint)) + fingerprint
    if not adapter_digest:
        return _digest(b"kv-root", fixed + tenant_salt)
    return _digest(b"kv-root-adapter", fixed + struct.pack("<I", len(adapter_digest)) + adapter_digest + tenant_salt)


def block_name(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of the block that holds exactly these tokens after `parent`; fewer than a block's give a tail's name."""
    return _digest(b"kv-block", parent + _token_bytes(token_ids))


def block_names(root: bytes, token_ids: Sequence[int], block_size: int, with_tail: bool) -> list[bytes]:
    """Names of the full blocks of a prompt, in order; with_tail adds the shorter block at its end, if there is one."""
    packed = _token_bytes(token_ids)
    num_tokens = len(token_ids)
    end = num_tokens if with_tail else num_tokens - num_tokens % block_size
    names: list[bytes] = []
    parent = root
    for start in range(0, end, block_size):
        parent = _digest(b"kv-block", parent + packed[4 * start : 4 * min(start + block_size, num_tokens)])
        names.append(parent)
    return names


def fragment_key(block_name: bytes, first_layer: int, num_layers: int, kv_head: int) -> bytes:
    """Key of one block x `num_layers` layers from `first_layer` x one KV head, both counted over the whole model."""
    return _FRAGMENT_KEY.pack(block_name, first_layer, num_layers, kv_head)


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _digest(domain: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=NAME_BYTES, person=domain).digest()
