"""The arithmetic of the fake engine: what lies in a KV slot, and which token follows, as hashes of the history.

Every token of a stream leaves one 32-bit hash, of the token, its position and all hashes before it. A slot of the cache
holds that hash spread over all layers, heads, keys and values: word e of the slot is A[e] * hash + B[e] (mod 2^32),
with other A and B for each e. Reading goes back: the sum of W[e] * word[e] gives the hash again, if and only if every
word is the right one in its slot (but for chance, 1 in 2^32). The next token is a hash of the sum over all
positions, so one wrong, stale or exchanged byte anywhere in a stream's cache changes its tokens from there on.

The tokens do not depend on the shape of the cache. Knows nothing of blocks, plans or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from workers.sampling.params import TokenLogprobs

Words = npt.NDArray[np.uint32]

_MASK = 0xFFFFFFFF
_TOKEN, _GREEDY, _SAMPLED = 0x9E3779B1, 0x5BD1E995, 0x27D4EB2F  # keep the uses of one hash function apart


def mix(x: int) -> int:
    """A bijection of 32-bit numbers without visible pattern."""
    x &= _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _mix_all(x: Words) -> Words:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def position_weight(position: int) -> int:
    """Odd, so that no bit of a hash gets lost in the sum."""
    return mix(position) | 1


def position_weights(first: int, last: int) -> Words:
    """Those of first .. last - 1."""
    return _mix_all(np.arange(first, last, dtype=np.uint32)) | np.uint32(1)


def token_hash(summed: int, position: int, token_id: int) -> int:
    """What a token leaves behind. summed: over all positions before it."""
    return mix(summed + mix(token_id * _TOKEN + position))


def choose(summed: int, temperature: float, seed: int, position: int, vocab_size: int) -> int:
    """The token after a history. position: in the completion; matters, like the seed, when it is sampled."""
    if temperature <= 0:
        return mix(summed ^ _GREEDY) % vocab_size
    draw = mix(mix(seed ^ _SAMPLED) + mix(seed >> 32) + position)
    return mix(summed ^ draw) % vocab_size


def adapter_word(digest: bytes) -> int:
    """What an adapter adds to all hashes, in place of what it adds to weights; 0 for none."""
    return mix(int.from_bytes(digest[:4], "little")) | 1 if digest else 0


def fake_logprobs(token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Numbers that belong to the chosen token, in place of its logprobs."""
    top_ids = [(token_id + i) % vocab_size for i in range(num_top)]
    return TokenLogprobs(-(token_id % 64) / 64, top_ids, [-i / 8 for i in range(num_top)])


def fake_completion(
    prompt_ids: Sequence[int],
    num_tokens: int,
    vocab_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    adapter_digest: bytes = b"",
) -> list[int]:
    """The right tokens after a prompt, whatever engine, batch or cache they come from; end-of-text is not looked at."""
    summed, word = 0, adapter_word(adapter_digest)
    completion: list[int] = []
    for position, token_id in enumerate(prompt_ids):
        summed += position_weight(position) * token_hash(summed + word, position, token_id)
    for i in range(num_tokens):
        completion.append(choose(summed & _MASK, temperature, seed, i, vocab_size))
        position = len(prompt_ids) + i
        summed += position_weight(position) * token_hash(summed + word, position, completion[-1])
    return completion


class SlotCode:
    """Writes hashes into the words of slots and reads them back."""

    def __init__(self, num_words: int) -> None:
        index = np.arange(num_words, dtype=np.uint32)
        self._factors = _mix_all(index * np.uint32(3) + np.uint32(1))
        self._offsets = _mix_all(index * np.uint32(3) + np.uint32(2))
        self.weights: Words = _mix_all(index * np.uint32(3) + np.uint32(3)) | np.uint32(1)
        if int((self._factors * self.weights).sum(dtype=np.uint32)) % 2 == 0:
            self._factors[0] += np.uint32(1)  # an odd sum has an inverse
        total = int((self._factors * self.weights).sum(dtype=np.uint32))
        self._inverse = np.uint32(pow(total, -1, 1 << 32))
        self._offset = (self._offsets * self.weights).sum(dtype=np.uint32)

    def encode(self, hashes: Sequence[int]) -> Words:
        """[len(hashes), num_words]."""
        words: Words = np.array(hashes, np.uint32)[:, None] * self._factors + self._offsets
        return words

    def decode(self, weighted: Words) -> Words:
        """The hashes, given each slot's sum of weights * words."""
        hashes: Words = (weighted - self._offset) * self._inverse
        return hashes
