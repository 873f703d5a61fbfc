"""Static scales of keys and values for an e4m3 KV cache, one each for a layer. Knows nothing of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.grids.floating import FP8_MOST, round_e4m3
from compress.walk import CacheTap
from workers.model.cache_spec import CacheSpec

_NAMES = ("k_scale", "v_scale")  # in the order of the cache's planes


class CacheRecorder:
    """The largest keys and values while calibration blocks run; `tap` is for ModelWalk.through."""

    def __init__(self, spec: CacheSpec) -> None:
        assert not spec.is_latent
        self._peaks = torch.zeros(spec.num_planes)

    def tap(self, cache: Tensor) -> None:
        """[blocks, heads, K|V, slots, head_dim]."""
        self._peaks = torch.maximum(self._peaks, cache.abs().amax((0, 1, 3, 4)).float().cpu())

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """By name: fp32 [1] each."""
        scales = (self._peaks / FP8_MOST).clamp(min=1e-12)
        return {prefix + name: scale.reshape(1).clone() for name, scale in zip(_NAMES, scales, strict=True)}


def rounded_cache(tensors: Mapping[str, Tensor], prefix: str) -> CacheTap | None:
    """What an e4m3 cache with these scales does to keys and values; None where there are none."""
    if prefix + _NAMES[0] not in tensors:
        return None
    scales = torch.stack([tensors[prefix + name].float() for name in _NAMES])

    def tap(cache: Tensor) -> None:
        scale = scales.view(1, 1, -1, 1, 1).to(cache.device)
        cache.copy_(round_e4m3(cache.float() / scale) * scale)

    return tap
