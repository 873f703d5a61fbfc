"""The scheme that a name of kvstore.kv_cache_dtype stands for. Without torch."""

from __future__ import annotations

from collections.abc import Mapping

from workers.kv.schemes.exact import EXACT_SCHEME
from workers.kv.schemes.fp8 import Fp8Scheme
from workers.kv.schemes.int8 import Int8Scheme
from workers.kv.schemes.scheme import KVScheme

_SCHEMES: Mapping[str, KVScheme] = {"auto": EXACT_SCHEME, "int8": Int8Scheme(), "fp8": Fp8Scheme()}


def kv_scheme(kv_cache_dtype: str) -> KVScheme:
    """Of kvstore.config.KV_CACHE_DTYPES."""
    return _SCHEMES[kv_cache_dtype]
