"""A scale and a shift of each channel of keys and values, learned for a cache that packs tokens in 4 bits: WKVQuant's
(arXiv:2402.12065). Knows nothing of weights.

A token's channels share a scale by groups, so the channel with the widest range sets the steps of all in its group.
Keys are shifted and scaled by channel before they are packed, which makes channels alike. What is learned makes the
error least that the next product sees: a key's channel weighs by the mean square of the queries that meet it. WKVQuant
learns by outputs a few blocks later; here each layer is learned by itself, as in all of compress. The first tokens of a
sequence are not learned by: their keys are unlike all others, and a server keeps them exact (kvstore.kv_sink_tokens).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.calibration.walk import CacheTap
from costs.packed_kv import PackedBits, channel_group
from kernels.kv.packed_blocks import pack_blocks, unpack_blocks
from workers.model.cache_spec import CacheSpec
from workers.model.parts import kv_channel_names

BITS = PackedBits(4, 4, has_token_keys=True, has_channel_scales=True)
_SINK_TOKENS = 16  # at the beginning of each block of tokens
_TOKENS = 4096  # that are learned by, at most
_STEPS = 200
_LEARNING_RATE = 0.03
_SMALLEST = 1e-4


class ChannelRecorder:
    """Keys, values and queries while calibration blocks run. The taps are for ModelWalk.through."""

    def __init__(self, spec: CacheSpec, block_tokens: int) -> None:
        assert not spec.is_latent
        self._block_tokens = block_tokens
        self._heads = spec.num_kv_heads
        self._samples: list[Tensor] = []
        self._squares = torch.zeros(spec.num_kv_heads, spec.head_dim)

    def tap(self, cache: Tensor) -> None:
        """[blocks, heads, K|V, slots, head_dim]."""
        tokens = cache.permute(0, 3, 1, 2, 4)  # [blocks, slots, heads, K|V, head_dim]
        by_sequence = tokens.unflatten(0, (-1, -(-self._block_tokens // tokens.shape[1]))).flatten(1, 2)
        first = min(_SINK_TOKENS, self._block_tokens // 2)
        self._samples.append(by_sequence[:, first : self._block_tokens].flatten(0, 1).float().cpu())

    def tap_queries(self, q: Tensor) -> None:
        """[tokens, query heads, head_dim]."""
        by_head = q.float().cpu().unflatten(1, (self._heads, -1))
        self._squares += by_head.square().sum((0, 2))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """By name: fp32 [kv_heads, head_dim] each."""
        tokens = torch.cat(self._samples)
        tokens = tokens[:: -(-len(tokens) // _TOKENS)]  # [tokens, heads, K|V, head_dim]
        weights = self._squares / self._squares.mean().clamp(min=_SMALLEST)
        learned = [learn(tokens[:, :, 0], weights), learn(tokens[:, :, 1], torch.ones_like(weights))]
        parts = (part for scale, shift in learned for part in (scale, shift))
        return dict(zip(kv_channel_names(prefix), parts, strict=True))


def learn(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts, fp32 [heads, head_dim], of numbers [tokens, heads, head_dim]; ones and zeros where nothing is
    better. weights: of a channel's squared error, [heads, head_dim]."""
    plain = torch.ones_like(weights), torch.zeros_like(weights)
    tried = [plain, *_descent(x, weights)]
    errors = torch.stack([_error(x, weights, *each) for each in tried])  # [tried, heads]
    best = errors.argmin(0)
    scale, shift = (torch.stack([each[i] for each in tried]) for i in range(2))
    heads = torch.arange(len(best))
    return scale[best, heads].contiguous(), shift[best, heads].contiguous()


def _descent(x: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where it begins, and where it ends. The error that is made smaller is that of rounding to steps of a token's
    range, each number being anywhere within a step: scale^2 * step^2 / 12."""
    start = x.std(0).clamp(min=_SMALLEST), x.mean(0)
    log_scale, shift = start[0].log().requires_grad_(), start[1].clone().requires_grad_()
    size = channel_group(x.shape[-1])
    optimizer = torch.optim.Adam([log_scale, shift], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            scale = log_scale.exp()
            groups = ((x - shift) / scale).unflatten(-1, (-1, size))
            steps = groups.amax(-1) - groups.amin(-1)  # [tokens, heads, groups]
            of_groups = (weights * scale.square()).unflatten(-1, (-1, size)).sum(-1)
            loss = (of_groups * steps.square().mean(0)).sum(-1).log().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [start, (log_scale.detach().exp(), shift.detach())]


def _error(x: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Of each head, when numbers are packed as the engine does."""
    rows = x.movedim(0, 1)[None, :, None].expand(1, -1, 2, -1, -1)  # one block of all tokens
    channels = torch.stack((scale, shift), 1).unsqueeze(1).expand(-1, 2, -1, -1)
    packed = unpack_blocks(pack_blocks(rows, BITS, channels), BITS, torch.float32, channels)
    return ((packed - rows)[0, :, 0].square() * weights.unsqueeze(1)).sum((1, 2))


def channel_scales(tensors: Mapping[str, Tensor], prefix: str) -> Tensor | None:
    """fp32 [kv_heads, keys | values, scale | shift, head_dim], as kernels.kv.packed_blocks; None: there are none."""
    names = kv_channel_names(prefix)
    if names[0] not in tensors:
        return None
    found: Tensor = torch.stack([tensors[name].float() for name in names], 1).unflatten(1, (2, 2))
    return found


def packed_cache(tensors: Mapping[str, Tensor], prefix: str) -> CacheTap | None:
    """What packing all tokens does to keys and values, none of them exact; None: they are not packed."""
    channels = channel_scales(tensors, prefix)
    if channels is None:
        return None

    def tap(cache: Tensor) -> None:
        on_device = channels.to(cache.device)
        cache.copy_(unpack_blocks(pack_blocks(cache, BITS, on_device), BITS, cache.dtype, on_device))

    return tap
