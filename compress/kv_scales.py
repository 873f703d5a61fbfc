"""Static scales of keys and values for an e4m3 KV cache, one each for a layer. Knows nothing of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.calibration.walk import CacheTap
from compress.grids.floating import FP8_MOST, round_e4m3
from workers.model.cache_spec import CacheSpec

_SAMPLE_PER_CALL = 20_000
_STEPS = 16  # of an octave
_NAMES = ("k_scale", "v_scale")  # in the order of the cache's planes


class CacheRecorder:
    """Keys and values while calibration blocks run: the largest, and a sample. `tap` is for ModelWalk.through."""

    def __init__(self, spec: CacheSpec) -> None:
        assert not spec.is_latent
        self._peaks = torch.zeros(spec.num_planes)
        self._samples: list[Tensor] = []

    def tap(self, cache: Tensor) -> None:
        """[blocks, heads, K|V, slots, head_dim]."""
        self._peaks = torch.maximum(self._peaks, cache.abs().amax((0, 1, 3, 4)).float().cpu())
        planes = cache.movedim(2, 0).flatten(1).float().cpu()
        self._samples.append(planes[:, :: max(1, planes.shape[1] // _SAMPLE_PER_CALL)].clone())

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """By name: fp32 [1] each."""
        samples = torch.cat(self._samples, 1)
        scales = [_best_scale(*both) for both in zip(self._peaks, samples, strict=True)]
        return {prefix + name: scale.reshape(1) for name, scale in zip(_NAMES, scales, strict=True)}


def _best_scale(peak: Tensor, sample: Tensor) -> Tensor:
    """The least squared error among scales that cut nothing off. e4m3's steps double at powers of two: it matters how
    many numbers lie just above one."""
    tried = [(peak / FP8_MOST).clamp(min=1e-12) * 2 ** (step / _STEPS) for step in range(_STEPS)]
    errors = [float((round_e4m3(sample / scale) * scale - sample).square().sum()) for scale in tried]
    return tried[errors.index(min(errors))]


def rounded_cache(tensors: Mapping[str, Tensor], prefix: str) -> CacheTap | None:
    """What an e4m3 cache with these scales does to keys and values; None where there are none."""
    if prefix + _NAMES[0] not in tensors:
        return None
    scales = torch.stack([tensors[prefix + name].float() for name in _NAMES])

    def tap(cache: Tensor) -> None:
        scale = scales.view(1, 1, -1, 1, 1).to(cache.device)
        cache.copy_(round_e4m3(cache.float() / scale) * scale)

    return tap
