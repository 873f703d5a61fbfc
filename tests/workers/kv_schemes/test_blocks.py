"""What blocks of the schemes take up, how their parts travel as one fragment, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvstore.config import KV_CACHE_DTYPES, KVStoreConfig
from tests.workers.engine_group import EngineGroup
from tests.workers.runtime.test_batch_invariance import GREEDY
from tests.workers.tiny_llama import make_checkpoint, prompts, with_kv_channels
from workers.config import EngineConfig
from workers.engine.step import BlockTransfer
from workers.errors import ModelError
from workers.kv.paged_cache import CacheLayout, PagedCache
from workers.kv.schemes.named import KVCacheOptions
from workers.model.cache_spec import CacheSpec
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint
from workers.parallel import Shard
from workers.runtime.build import kv_fingerprint
from workers.runtime.pool_needs import PoolNeeds

CPU = torch.device("cpu")
LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM = 4, 2, 8, 16
ONE_GROUP = ("auto", "int8", "fp8")
SPECS = [CacheSpec(HEADS, HEAD_DIM)] * LAYERS
TRANSFER = BlockTransfer(1, 0, [b"a", b"b", b"c"], [5, 0, 3], [BLOCK_SIZE, BLOCK_SIZE, 3])


def layout(kv_cache_dtype: str, shard: Shard | None = None, dtype: torch.dtype = torch.bfloat16) -> CacheLayout:
    scheme = KVCacheOptions(kv_cache_dtype, 8, 4).scheme(BLOCK_SIZE)
    return CacheLayout(scheme.groups(SPECS), range(LAYERS), shard or Shard(), BLOCK_SIZE, dtype, scheme)


def filled(cache: PagedCache, seed: int) -> PagedCache:
    generator = torch.Generator().manual_seed(seed)
    for tensors in cache.tensors:
        for tensor in tensors:
            raw = tensor.view(torch.uint8)
            raw.copy_(torch.randint(0, 100, raw.shape, generator=generator, dtype=torch.uint8))
    return cache


@pytest.mark.parametrize(("kv_cache_dtype", "row_bytes"), [("auto", 32), ("int8", 20), ("fp8", 16)])
def test_blocks_count_all_their_bytes(kv_cache_dtype: str, row_bytes: int) -> None:
    found = layout(kv_cache_dtype)
    (group,) = found.groups
    assert found.block_bytes(group) == LAYERS * HEADS * 2 * BLOCK_SIZE * row_bytes
    cache = PagedCache(found, [6], CPU)
    assert sum(t.numel() * t.element_size() for t in cache.tensors[0]) == 6 * found.block_bytes(group)
    assert found.blocks_that_fit(1_000_000, [1 << 31]) == [1_000_000 // found.block_bytes(group)]
    split = layout(kv_cache_dtype, Shard(2, 1))
    assert split.block_bytes(group) * 2 == found.block_bytes(group)


@pytest.mark.parametrize("layers_per_fragment", [1, 2, 4])
@pytest.mark.parametrize("kv_cache_dtype", ONE_GROUP)
def test_blocks_arrive_with_all_their_parts(kv_cache_dtype: str, layers_per_fragment: int) -> None:
    """Whole blocks and a short one; what does not belong to them is left alone."""
    source, target = (filled(PagedCache(layout(kv_cache_dtype), [6], CPU), seed) for seed in (1, 2))
    before = [tensor.clone() for tensor in target.tensors[0]]
    (sender,), (reader,) = (cache.memories(layers_per_fragment, "none") for cache in (source, target))
    fragments = sender.gather(TRANSFER)()
    filling = reader.fill(TRANSFER)
    assert len(fragments) == len(filling.fragments) == 3 * LAYERS // layers_per_fragment * HEADS
    (group,) = source.layout.groups
    share = layers_per_fragment * group.block_bytes(BLOCK_SIZE, "bfloat16")
    assert [f.nbytes for f in fragments[:: len(fragments) // 3]] == [share, share, share * 3 // BLOCK_SIZE]
    for buffer, fragment in zip(filling.fragments, fragments, strict=True):
        np.copyto(buffer, fragment.reshape(buffer.shape))
    filling.finish(3)
    for sent, got, old in zip(source.tensors[0], target.tensors[0], before, strict=True):
        sent, got, old = (tensor.view(torch.uint8) for tensor in (sent, got, old))
        assert torch.equal(got[:, [5, 0]], sent[:, [5, 0]])
        assert torch.equal(got[:, 3, :, :, :3], sent[:, 3, :, :, :3])
        assert torch.equal(got[:, 3, :, :, 3:], old[:, 3, :, :, 3:])
        assert torch.equal(got[:, [1, 2, 4]], old[:, [1, 2, 4]])


def test_only_whole_blocks_are_brought_in() -> None:
    source, target = (filled(PagedCache(layout("int8"), [6], CPU), seed) for seed in (1, 2))
    before = [tensor.clone() for tensor in target.tensors[0]]
    filling = target.memories(2, "none")[0].fill(TRANSFER)
    for buffer, fragment in zip(filling.fragments, source.memories(2, "none")[0].gather(TRANSFER)(), strict=True):
        np.copyto(buffer, fragment)
    filling.finish(1)
    for sent, got, old in zip(source.tensors[0], target.tensors[0], before, strict=True):
        assert torch.equal(got[:, 5], sent[:, 5])
        assert torch.equal(got[:, :5], old[:, :5])


@pytest.mark.parametrize(("kv_cache_dtype", "bits"), [("kivi4", 4), ("kivi2", 2)])
def test_a_mixed_precision_scheme_has_a_group_for_each_form(kv_cache_dtype: str, bits: int) -> None:
    """Packed ones for all tokens; exact ones for the window of 8, and for the first block, in which the 4 sinks are."""
    found = layout(kv_cache_dtype)
    packed, exact, sinks = found.groups
    codes, scales = 2 * BLOCK_SIZE * HEAD_DIM * bits // 8, 2 * 2 * (HEAD_DIM + BLOCK_SIZE)
    assert found.block_bytes(packed) == LAYERS * HEADS * (codes + scales)
    assert found.block_bytes(exact) == found.block_bytes(sinks) == LAYERS * HEADS * 2 * BLOCK_SIZE * HEAD_DIM * 2
    assert [group.spec.window for group in found.groups] == [0, 8, 0]
    assert [group.limit(BLOCK_SIZE) for group in found.groups] == [0, 0, 1]
    assert [group.num_blocks_held(1000, BLOCK_SIZE) for group in found.groups] == [125, 2, 1]
    keys = [key for grid in PagedCache(found, [4, 4, 4], CPU).grids(2) for key in grid.keys(bytes(16))]
    assert len(set(keys)) == 3 * HEADS * LAYERS // 2


def test_layers_that_see_no_more_than_the_window_are_not_packed() -> None:
    specs = [CacheSpec(HEADS, HEAD_DIM), CacheSpec(HEADS, HEAD_DIM, window=8), CacheSpec(HEADS, HEAD_DIM, window=64)]
    groups = KVCacheOptions("kivi2", 8, 0).scheme(BLOCK_SIZE).groups(specs)
    assert [(group.layers, group.spec.window, group.level) for group in groups] == [
        ((0,), 0, 0), ((1,), 8, 0), ((2,), 64, 0), ((0,), 8, 1), ((2,), 8, 1)
    ]  # fmt: skip
    assert [group.takes_full_blocks for group in groups] == [True, False, True, False, False]


def test_memory_goes_to_what_is_kept_for_long() -> None:
    """The exact blocks are as many as running requests need, the rest of the memory holds packed ones."""
    found = layout("kivi2")
    config = EngineConfig("", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=512)
    packed, exact, sinks = PoolNeeds(config, BLOCK_SIZE, 512, 1).num_blocks(found, lambda: 1 << 20)
    assert (exact, sinks) == (2 * 2 * 4 + 7, 2 * 4)  # two blocks hold a window of 8; a chunk of 32 and a window take 7
    spent = sum(
        count * found.block_bytes(group) for count, group in zip((packed, exact, sinks), found.groups, strict=False)
    )
    assert 0 <= (1 << 20) - spent < found.block_bytes(found.groups[0])
    assert packed > 10 * exact


def test_layers_with_a_window_have_no_first_tokens_to_keep() -> None:
    groups = KVCacheOptions("kivi2", 8, 4).scheme(BLOCK_SIZE).groups([CacheSpec(HEADS, HEAD_DIM, window=64)])
    assert [(group.spec.window, group.first_tokens) for group in groups] == [(64, 0), (8, 0)]


def test_the_window_is_a_block_at_least() -> None:
    groups = KVCacheOptions("kivi2", 3, 0).scheme(BLOCK_SIZE).groups(SPECS)
    assert [group.spec.window for group in groups] == [0, BLOCK_SIZE]


def test_heads_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^kv_cache_dtype: kivi2 does not pack heads of 6 numbers$"):
        KVCacheOptions("kivi2", 8, 0).scheme(BLOCK_SIZE).groups([CacheSpec(2, 6)])


def test_blocks_that_are_not_full_have_nothing_packed() -> None:
    """Their fragments are there, and change nothing where they arrive."""
    source, target = (filled(PagedCache(layout("kivi2"), [6] * 3, CPU), seed) for seed in (1, 2))
    before = [tensor.clone() for tensor in target.tensors[0]]
    sender, reader = (cache.memories(2, "none")[0] for cache in (source, target))
    fragments, filling = sender.gather(TRANSFER)(), reader.fill(TRANSFER)
    for buffer, fragment in zip(filling.fragments, fragments, strict=True):
        np.copyto(buffer, fragment)
    assert not any(fragment.any() for fragment in fragments[-4:])
    filling.finish(3)
    for sent, got, old in zip(source.tensors[0], target.tensors[0], before, strict=True):
        sent, got, old = (tensor.view(torch.uint8) for tensor in (sent, got, old))
        assert torch.equal(got[:, [5, 0]], sent[:, [5, 0]])
        assert torch.equal(got[:, [1, 2, 3, 4]], old[:, [1, 2, 3, 4]])


def test_blocks_of_other_schemes_have_other_names(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("gqa", tmp_path)
    model = load_config(checkpoint)
    engines = [EngineConfig(str(checkpoint), kv_cache_dtype=name) for name in KV_CACHE_DTYPES]
    engines += [EngineConfig(str(checkpoint), kv_encoding=name) for name in ("int8", "fp8")]
    engines += [EngineConfig(str(checkpoint), kv_cache_dtype="kivi2", kv_window_tokens=64)]
    engines += [EngineConfig(str(checkpoint), kv_cache_dtype="kivi2", kv_sink_tokens=4)]
    assert len({kv_fingerprint(engine, model, torch.float32, "weights") for engine in engines}) == len(engines)


@pytest.mark.parametrize("kv_cache_dtype", sorted(set(KV_CACHE_DTYPES) - {"auto"}))
def test_latent_caches_are_refused(kv_cache_dtype: str) -> None:
    with pytest.raises(ModelError, match=r"^kv_cache_dtype: must be auto for a latent cache, .*, not '"):
        KVCacheOptions(kv_cache_dtype, 8, 4).scheme(BLOCK_SIZE).groups([CacheSpec(1, 24, is_latent=True)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype: must be one of auto, int8, fp8, kivi8_4"),
        ({"kv_cache_dtype": "int8", "kv_encoding": "int8"}, "kv_encoding: must be none, not 'int8': with kv_cache_dt"),
        ({"kv_cache_dtype": "fp8", "runner": "fake"}, "kv_cache_dtype: must be auto with runner=fake"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        EngineConfig("", **options)
    assert "\n" not in str(caught.value)
    if "runner" not in options:
        with pytest.raises(ValueError, match=f"^{message}"):
            KVStoreConfig(**options)


def with_scales(checkpoint: Path, folder: Path, scale: torch.Tensor) -> Path:
    """The same model, which says how its fp8 cache is scaled."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    scales = {f"model.layers.{i}.self_attn.{kind}_scale": scale.clone() for i in range(3) for kind in "kv"}
    save_file(tensors | scales, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1, 1)], ids=str)
def test_the_checkpoints_scales_are_those_of_an_fp8_cache(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """With a scale of 2 ** -20 nearly all keys and values are cut; one of 2 ** -2 changes no rounding but that of the
    smallest."""
    checkpoint = make_checkpoint("gqa", tmp_path)
    cutting = with_scales(checkpoint, tmp_path / "cutting", torch.full(shape, 2.0**-20))
    scaling = with_scales(checkpoint, tmp_path / "scaling", torch.full(shape, 2.0**-2))
    check_checkpoint(scaling, load_config(scaling))
    config = EngineConfig(str(checkpoint), "float32", "cpu", num_blocks=64, max_num_batched_tokens=7)
    with EngineGroup(1, 1) as alone:
        exact = alone.run(config, prompts(), GREEDY)
        same = alone.run(replace(config, model_dir=str(cutting)), prompts(), GREEDY)
        unscaled, scaled, cut = (
            alone.run(replace(config, model_dir=str(path), kv_cache_dtype="fp8"), prompts(), GREEDY)
            for path in (checkpoint, scaling, cutting)
        )
    assert all(torch.equal(a, b) for a, b in zip(same.logits, exact.logits, strict=True))  # an exact cache needs none
    for plain, finer, wrong, right in zip(unscaled.logits, scaled.logits, cut.logits, exact.logits, strict=True):
        assert (finer[0] - right[0]).norm() < 1.05 * (plain[0] - right[0]).norm()
        assert (wrong[0] - right[0]).norm() > 3 * (plain[0] - right[0]).norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_channel_scale": torch.zeros(2, 8)}, r"k_channel_scale: a scale must be positive$"),
        ({"v_channel_shift": None}, r"^no tensor model\.layers\.0\.self_attn\.v_channel_shift, though others of"),
        ({"v_channel_scale": torch.ones(2, 9)}, r"v_channel_scale is \[2, 9\], config.json says \[2, 8\]$"),
    ],
)
def test_channel_scales_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = with_kv_channels(make_checkpoint("gqa", tmp_path))
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{name}": tensor for name, tensor in change.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")
    config = EngineConfig(str(path), "float32", "cpu", num_blocks=64)
    from workers.parallel import ParallelGroups
    from workers.runtime.runner import TorchModelRunner

    with pytest.raises(ModelError, match=message):
        TorchModelRunner(config, load_config(path), ParallelGroups(Shard(), CPU), CPU)


def test_channel_scales_change_what_is_packed_and_nothing_else(tmp_path: Path) -> None:
    """wkv4 with ones and zeros is token4, bit for bit; an exact cache does not look at them."""
    plain = make_checkpoint("gqa", tmp_path / "plain")
    scaled, ones = (with_kv_channels(make_checkpoint("gqa", tmp_path / name)) for name in ("scaled", "ones"))
    tensors = load_file(ones / "model.safetensors")
    for name, tensor in tensors.items():
        if "_channel_" in name:
            tensor.fill_(float(name.endswith("scale")))
    save_file(tensors, ones / "model.safetensors")
    sizes = {"block_size": 4, "kv_window_tokens": 4, "kv_sink_tokens": 0}
    config = EngineConfig("", "float32", "cpu", num_blocks=64, max_num_batched_tokens=7, **sizes)
    with EngineGroup(1, 1) as alone:

        def logits(path: Path, name: str) -> list[torch.Tensor]:
            return alone.run(replace(config, model_dir=str(path), kv_cache_dtype=name), prompts(), GREEDY).logits

        token4, same, other = logits(plain, "token4"), logits(ones, "wkv4"), logits(scaled, "wkv4")
        exact, also_exact = logits(plain, "auto"), logits(scaled, "auto")
    assert all(torch.equal(a, b) for a, b in zip(token4, same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(exact, also_exact, strict=True))
    assert not torch.equal(token4[1], other[1])


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(tmp_path: Path, bad: float) -> None:
    path = with_scales(make_checkpoint("gqa", tmp_path), tmp_path / "bad", torch.tensor([bad]))
    config = EngineConfig(str(path), "float32", "cpu", num_blocks=64)
    from workers.parallel import ParallelGroups
    from workers.runtime.runner import TorchModelRunner

    with pytest.raises(ModelError, match=r"^model\.layers\.0\.self_attn\.k_scale: a scale must be positive$"):
        TorchModelRunner(config, load_config(path), ParallelGroups(Shard(), CPU), CPU)
