"""The scheme that a name of kvstore.kv_cache_dtype stands for. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from costs.packed_kv import PackedBits
from workers.config import EngineConfig
from workers.kv.schemes.exact import EXACT_SCHEME
from workers.kv.schemes.fp8 import Fp8Scheme
from workers.kv.schemes.int8 import Int8Scheme
from workers.kv.schemes.mixed_precision import MixedPrecisionScheme, PackedForm, PrecisionLevel
from workers.kv.schemes.scheme import KVScheme

_EVERY_BLOCK_ALONE: Mapping[str, KVScheme] = {"auto": EXACT_SCHEME, "int8": Int8Scheme(), "fp8": Fp8Scheme()}
_LEVELS: Mapping[str, tuple[PrecisionLevel, ...]] = {
    "kivi4": (PrecisionLevel(PackedForm(PackedBits(4, 4))),),
    "kivi2": (PrecisionLevel(PackedForm(PackedBits(2, 2))),),
    "kivi2_v1": (PrecisionLevel(PackedForm(PackedBits(2, 1))),),
    "kivi8_4": (PrecisionLevel(PackedForm(PackedBits(4, 4))), PrecisionLevel(PackedForm(PackedBits(8, 8)), 128)),
    "kivi4_2": (PrecisionLevel(PackedForm(PackedBits(2, 2))), PrecisionLevel(PackedForm(PackedBits(4, 4)), 128)),
    "token4": (PrecisionLevel(PackedForm(PackedBits(4, 4, has_token_keys=True))),),
    "wkv4": (PrecisionLevel(PackedForm(PackedBits(4, 4, has_token_keys=True, has_channel_scales=True))),),
    "token2": (PrecisionLevel(PackedForm(PackedBits(2, 2, has_token_keys=True))),),
}


@dataclass(frozen=True, slots=True)
class KVCacheOptions:
    """What configurations say of the paged cache; see kvstore.config.KVStoreConfig."""

    kv_cache_dtype: str
    kv_window_tokens: int
    kv_sink_tokens: int

    def scheme(self, block_size: int) -> KVScheme:
        """With blocks of so many tokens."""
        scheme = _EVERY_BLOCK_ALONE.get(self.kv_cache_dtype)
        if scheme is not None:
            return scheme
        window = max(self.kv_window_tokens, block_size)  # a block is packed when it is full, and exact until then
        return MixedPrecisionScheme(self.kv_cache_dtype, _LEVELS[self.kv_cache_dtype], window, self.kv_sink_tokens)


def scheme_of(engine: EngineConfig) -> KVScheme:
    """That of an engine's cache."""
    options = KVCacheOptions(engine.kv_cache_dtype, engine.kv_window_tokens, engine.kv_sink_tokens)
    return options.scheme(engine.block_size)
