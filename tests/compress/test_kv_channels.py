"""Scales and shifts of channels: what is learned makes the packed cache better, and is served as it was measured."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.job import compress_model, open_model
from compress.kv_channels import BITS, ChannelRecorder, channel_scales, learn
from compress.request import Request, recipe_for
from kernels.kv.packed_blocks import pack_blocks, unpack_blocks
from tests.compress.models import make_blocks, make_model
from tests.workers.engine_group import EngineGroup
from tests.workers.runtime.test_batch_invariance import GREEDY
from workers.config import EngineConfig
from workers.model.cache_spec import CacheSpec

HEADS, HEAD_DIM = 2, 64


def uneven(num_tokens: int) -> torch.Tensor:
    """Tokens [tokens, heads, head_dim] whose channels are of several widths, and lie around several means."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator)
    widths = torch.rand(HEADS, HEAD_DIM, generator=generator) * 3 + 0.05
    return x * widths + torch.randn(HEADS, HEAD_DIM, generator=generator) * 4


def error(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> float:
    rows = x.movedim(0, 1)[None, :, None].expand(1, -1, 2, -1, -1)
    channels = torch.stack((scale, shift), 1).unsqueeze(1).expand(-1, 2, -1, -1)
    return float(
        (unpack_blocks(pack_blocks(rows, BITS, channels), BITS, torch.float32, channels) - rows).square().mean()
    )


def test_learned_channels_are_better_on_tokens_that_were_not_seen() -> None:
    x, ones, zeros = uneven(600), torch.ones(HEADS, HEAD_DIM), torch.zeros(HEADS, HEAD_DIM)
    scale, shift = learn(x[:400], ones)
    assert bool((scale > 0).all())
    unseen = x[400:]
    by_width = error(unseen, x[:400].std(0), x[:400].mean(0))
    assert error(unseen, scale, shift) < 0.95 * by_width
    assert error(unseen, scale, shift) < 0.3 * error(unseen, ones, zeros)


def test_channels_that_matter_more_are_kept_better() -> None:
    x, weights = uneven(400), torch.ones(HEADS, HEAD_DIM)
    weights[:, :8] = 100.0
    changes = []
    for each in (torch.ones_like(weights), weights):
        scale, shift = learn(x, each)
        rows = x.movedim(0, 1)[None, :, None].expand(1, -1, 2, -1, -1)
        channels = torch.stack((scale, shift), 1).unsqueeze(1).expand(-1, 2, -1, -1)
        found = unpack_blocks(pack_blocks(rows, BITS, channels), BITS, torch.float32, channels)
        changes.append(float((found - rows)[..., :8].square().sum()))
    assert changes[1] < 0.7 * changes[0]


def test_equal_channels_stay_as_they_are_or_become_better() -> None:
    x = torch.rand(300, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    ones, zeros = torch.ones(HEADS, HEAD_DIM), torch.zeros(HEADS, HEAD_DIM)
    assert error(x, *learn(x, ones)) <= error(x, ones, zeros)


def test_first_tokens_and_empty_slots_are_not_learned_by() -> None:
    """Two sequences of 100 tokens, in two blocks of 64 slots each."""
    x, found = uneven(200), []
    for first, empty in ((0.0, 0.0), (1e4, -1e4)):
        cache = torch.full((2, 128, HEADS, 2, HEAD_DIM), empty)
        cache[:, :100] = x.view(2, 100, HEADS, 1, HEAD_DIM)
        cache[:, :16] += first
        recorder = ChannelRecorder(CacheSpec(HEADS, HEAD_DIM), 100)
        recorder.tap(cache.unflatten(1, (2, 64)).flatten(0, 1).permute(0, 2, 3, 1, 4))
        recorder.tap_queries(torch.ones(10, 4, HEAD_DIM))
        found.append(recorder.tensors("p."))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_model_with_learned_channels_is_served(tmp_path: Path) -> None:
    """The loss that is reported is that of packing all tokens; the engine's logits are nearer with what was learned."""
    model = open_model(make_model("llama", tmp_path))
    report = compress_model(model, recipe_for(Request("wkv")), make_blocks(), tmp_path / "out", lambda done: None)
    assert report.loss is not None
    assert report.loss.kl_nats > 0
    prompts = [row.tolist() for row in make_blocks().held_out]
    sizes = {"block_size": 4, "num_blocks": 128, "kv_window_tokens": 4, "kv_sink_tokens": 0}
    with EngineGroup(1, 1) as alone:

        def logits(path: Path, name: str) -> torch.Tensor:
            config = EngineConfig(str(path), "float32", "cpu", max_num_batched_tokens=8, kv_cache_dtype=name, **sizes)
            return torch.stack([each[0] for each in alone.run(config, prompts, GREEDY).logits])

        exact = logits(tmp_path / "out", "auto")
        assert torch.equal(exact, logits(model.directory, "auto"))
        learned, unlearned = logits(tmp_path / "out", "wkv4"), logits(model.directory, "token4")
    assert 0 < float((learned - exact).norm()) < float((unlearned - exact).norm())


def test_the_engine_reads_what_was_learned(tmp_path: Path) -> None:
    tensors = {f"p.{kind}_channel_{part}": torch.rand(2, 4) + 1 for kind in "kv" for part in ("scale", "shift")}
    channels = channel_scales(tensors, "p.")
    assert channels is not None
    assert torch.equal(channels[1, 0, 1], tensors["p.k_channel_shift"][1])
    assert torch.equal(channels[0, 1, 0], tensors["p.v_channel_scale"][0])
    assert channel_scales({}, "p.") is None
