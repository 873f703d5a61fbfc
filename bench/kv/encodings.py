"""What KV blocks lose in 8 bits: how far keys and values move, and how many greedy tokens change.

    python -m bench.kv.encodings --model models/demo --text workers   # a JSON line per encoding

Each prompt is computed; its blocks are published and pulled as between two workers, through a tier in memory; then the
tokens that follow are chosen twice, one by one over the same history: on the blocks that were computed, and on those
that were pulled. Knows nothing of routers and clusters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from kvstore.config import KV_ENCODINGS
from kvstore.format.compression import compress
from kvstore.names import block_names, root_name
from kvstore.store import FragmentStore
from kvstore.tiers.memory_tier import MemoryTier
from workers.config import EngineConfig
from workers.engine.direct_plan import DirectChunk, direct_plan, run_transfers
from workers.engine.step import BlockTransfer
from workers.kv.codec import RowErrors, row_errors
from workers.kv.connector import KVConnector
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.runner import TorchModelRunner, pick_device

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class KVLoss:
    """One encoding over all prompts. Errors are of rows: the norm of what changed over the row's norm."""

    encoding: str
    num_prompts: int
    prompt_tokens: int
    num_compared_tokens: int
    fragment_bytes: int
    """Of all blocks of all prompts, headers included."""
    zstd_fragment_bytes: int
    """The same, compressed without loss as well (kvstore.format.compression)."""
    key_error_max: float
    key_error_mean: float
    value_error_max: float
    value_error_mean: float
    same_token_share: float
    """Of the tokens after the first, which the worker that computed the prompt chooses."""
    same_stream_share: float
    """Of the prompts: those after which no token changed."""


class LossMeter:
    """A model on this process alone, and a prompt's blocks twice: as computed, and as pulled."""

    def __init__(self, model_dir: str, prompt_tokens: int, new_tokens: int) -> None:
        self._num_blocks = -(-(prompt_tokens + new_tokens) // _BLOCK_SIZE)
        config = EngineConfig(
            model_dir, block_size=_BLOCK_SIZE, num_blocks=2 * self._num_blocks, max_num_batched_tokens=prompt_tokens
        )
        device = pick_device(config, 0)
        groups = ParallelGroups.connect(Shard.of_rank(0, 1, 1), device, "", "")
        self._runner = TorchModelRunner(config, load_config(model_dir), groups, device)
        self._computed = range(self._num_blocks)
        self._pulled = range(self._num_blocks, 2 * self._num_blocks)
        self._prompt_tokens, self._new_tokens = prompt_tokens, new_tokens

    def measure(self, encoding: str, prompts: Sequence[Sequence[int]]) -> KVLoss:
        """Prompts have the length that was said."""
        keys, values, same, num_same_streams = list[RowErrors](), list[RowErrors](), 0, 0
        num_bytes, num_zstd_bytes = 0, 0
        for prompt in prompts:
            tokens = [self._step(prompt, 0, self._computed)]
            while len(tokens) < self._new_tokens:
                tokens.append(self._step(tokens[-1:], len(prompt) + len(tokens) - 1, self._computed))
            fragments = self._move(prompt, encoding)
            num_bytes += sum(len(sealed) for sealed in fragments)
            num_zstd_bytes += sum(len(compress(sealed) or sealed) for sealed in fragments)
            changed = [
                self._step([token], len(prompt) + i, self._pulled) != tokens[i + 1]
                for i, token in enumerate(tokens[:-1])
            ]
            same += len(changed) - sum(changed)
            num_same_streams += not any(changed)
            whole = len(prompt) // _BLOCK_SIZE
            rows = self._runner.cache.tensors[0][0][:, :whole]  # [layers, blocks, heads, K and V, slots, head_dim]
            keys.append(row_errors(rows[:, :, :, 0], encoding))
            values.append(row_errors(rows[:, :, :, 1], encoding))
        num_compared = len(prompts) * (self._new_tokens - 1)
        return KVLoss(
            encoding=encoding,
            num_prompts=len(prompts),
            prompt_tokens=self._prompt_tokens,
            num_compared_tokens=num_compared,
            fragment_bytes=num_bytes,
            zstd_fragment_bytes=num_zstd_bytes,
            key_error_max=max(errors.largest for errors in keys),
            key_error_mean=sum(errors.mean for errors in keys) / len(keys),
            value_error_max=max(errors.largest for errors in values),
            value_error_mean=sum(errors.mean for errors in values) / len(values),
            same_token_share=same / num_compared,
            same_stream_share=num_same_streams / len(prompts),
        )

    def _step(self, token_ids: Sequence[int], start: int, blocks: Sequence[int]) -> int:
        """The greedy token after these."""
        chunk = DirectChunk(token_ids, start, start, [blocks], num_logits=1)
        return self._runner.execute(direct_plan([chunk])).sampled_token_ids[0]

    def _move(self, prompt: Sequence[int], encoding: str) -> list[memoryview]:
        """The prompt's blocks from where they were computed to the tier, and from there to their other block ids.

        The fragments, as the tier has them.
        """
        names = block_names(root_name(b"", b""), prompt, _BLOCK_SIZE, with_tail=True)
        num_tokens = [min(_BLOCK_SIZE, len(prompt) - i * _BLOCK_SIZE) for i in range(len(names))]
        tier = MemoryTier()
        cache = self._runner.cache
        connector = KVConnector(cache.memories(0, encoding), cache.grids(0), FragmentStore([tier]))
        self._runner.attach(connector)
        stored = BlockTransfer(1, 0, names, self._computed[: len(names)], num_tokens)
        loaded = BlockTransfer(2, 0, names, self._pulled[: len(names)], num_tokens)
        assert run_transfers(self._runner, stores=[stored]) == [len(names)]
        assert run_transfers(self._runner, loads=[loaded]) == [len(names)]
        connector.close()
        return [memoryview(sealed) for sealed in tier.stored.values()]


def prompts_of(folder: Path, model_dir: str, num_prompts: int, prompt_tokens: int) -> list[list[int]]:
    """The beginnings of Python files that are long enough, in the order of their names."""
    tokenizer = Tokenizer.from_file(f"{model_dir}/tokenizer.json")
    prompts: list[list[int]] = []
    for path in sorted(folder.rglob("*.py")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8")).ids[:prompt_tokens]
        if len(ids) == prompt_tokens and len(prompts) < num_prompts:
            prompts.append(ids)
    return prompts


def main(arguments: Sequence[str]) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv.encodings", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/demo", help="directory of the model")
    parser.add_argument("--text", type=Path, default=Path("workers"), help="folder with Python files for prompts")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=250)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    prompts = prompts_of(options.text, options.model, options.prompts, options.prompt_tokens)
    if not prompts:
        parser.error(f"--text: no file in {options.text} has {options.prompt_tokens} tokens")
    meter = LossMeter(options.model, options.prompt_tokens, options.new_tokens)
    for encoding in KV_ENCODINGS:
        print(json.dumps(asdict(meter.measure(encoding, prompts))), flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
