"""What a drafter with a KV cache has computed of each request: its rows, its KV blocks, and how far they are right.

The cache has an entry for each token of the request, and behind them for the drafts that were proposed last. Those that
the model accepted may stay; the others are overwritten. Blocks are named as the engine's are, under a fingerprint of
the drafter, so that a prefix that was computed for one request serves the next. Pure; knows nothing of tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from kvstore.blocks.block_pools import BlockPools, BlockTable
from kvstore.names import block_names, root_name
from workers.engine.request import Request


class DraftSequence:
    """Of one request."""

    def __init__(self, root: bytes) -> None:
        self.row = -1
        self.block_tables: list[BlockTable] = []
        self.block_names: list[bytes] = []
        self.num_computed = 0  # tokens of the request whose KV is in the cache
        self.num_kv = 0  # the same, but after a full prefix hit one more: its last token is computed again, not written
        self.num_sent_blocks = 0  # of the table, known to the runner
        self.num_registered = 0
        self.is_new = True  # the runner does not know its row
        self.num_left_out = 0  # tokens without an entry, among those before the next one
        self.next_id: int | None = None  # chosen behind the drafts, and not computed
        self._drafts: list[int] = []  # computed behind the tokens
        self._root = root

    def parent(self) -> bytes:
        """Of the next block to be named."""
        return self.block_names[-1] if self.block_names else self._root

    @property
    def proposed(self) -> list[int]:
        """Tokens that were chosen to follow those of the request, the last judgement taken."""
        return self._drafts if self.next_id is None else [*self._drafts, self.next_id]

    def take_judgement(self, token_ids: Sequence[int]) -> None:
        """The request has these tokens now. Drafts among them are computed; those behind them are still proposed if all
        before them were right."""
        proposed, right = self.proposed, 0
        while right < len(proposed) and token_ids[self.num_computed + right :][:1] == [proposed[right]]:
            right += 1
        are_left = right < len(proposed) and self.num_computed + right == len(token_ids)
        self.num_computed += min(right, len(self._drafts))
        self.num_kv = max(self.num_kv, self.num_computed)
        self._drafts = self._drafts[right:] if are_left else []
        self.next_id = self.next_id if are_left else None

    def computed(self, end: int, drafts: Sequence[int], next_id: int | None = None) -> None:
        """The tokens up to `end` are computed, and behind them these drafts; next_id was chosen behind those."""
        self.num_computed = end
        self.num_kv = max(self.num_kv, end)
        self._drafts, self.next_id = list(drafts), next_id

    def computed_ahead(self, choices: Sequence[int]) -> None:
        """What was chosen last is computed, and behind it all of these choices but the last."""
        self._drafts = [*self.proposed, *choices[:-1]]
        self.next_id = choices[-1]

    @property
    def end(self) -> int:
        """The entry of what was chosen last."""
        return self.num_computed + len(self._drafts)


class DraftSequences:
    """Of one drafter. max_rows: sequences that have blocks at a time; the one that was used last longest ago gives way
    to a new one. num_before: tokens of a request before the first that has an entry."""

    def __init__(self, pools: BlockPools, fingerprint: bytes, max_rows: int, num_before: int = 0) -> None:
        self._pools = pools
        self._groups = range(pools.num_groups)
        self._fingerprint = fingerprint
        self._free_rows = list(range(max_rows))
        self._num_before = num_before
        self._sequences: OrderedDict[str, DraftSequence] = OrderedDict()  # the one that was used last comes last

    @property
    def names(self) -> Collection[str]:
        """Ids of the requests that have one."""
        return self._sequences.keys()

    def of(self, request: Request, num_entries: int, used: Collection[str]) -> DraftSequence | None:
        """The request's sequence, with blocks for so many entries; None: others that are used now hold them.

        used: the ids of the requests whose sequences must stay.
        """
        name = request.request_id
        sequence = self._sequences.get(name)
        if sequence is None:
            if not self._free_rows and not self._give_up_oldest(used):
                return None
            sequence = self._sequences[name] = self._new(request)
        self._sequences.move_to_end(name)
        sequence.take_judgement(request.token_ids)
        return sequence if self._extend(sequence, num_entries, {*used, name}) else None

    def proposing(self, request: Request, num_entries: int, used: Collection[str]) -> DraftSequence | None:
        """The same of a request whose drafts are being judged, with blocks for so many entries behind them."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None or sequence.next_id is None:
            return None
        return sequence if self._extend(sequence, sequence.end + num_entries, used) else None

    def _extend(self, sequence: DraftSequence, num_entries: int, used: Collection[str]) -> bool:
        num_blocks = -(-num_entries // self._pools.block_size)
        while not self._pools.can_extend(sequence.block_tables, num_blocks, self._groups):
            if not self._give_up_oldest(used):
                return False
        self._pools.extend(sequence.block_tables, num_blocks, self._groups)
        return True

    def _new(self, request: Request) -> DraftSequence:
        size = self._pools.block_size
        sequence = DraftSequence(self._root(request))
        sequence.row = self._free_rows.pop()
        self._name(sequence, request.token_ids)
        num_hit = self._pools.num_matched(sequence.block_names)
        sequence.block_tables = self._pools.take_prefix(sequence.block_names[:num_hit])
        sequence.num_registered = num_hit
        sequence.num_kv = num_hit * size
        sequence.num_computed = min(sequence.num_kv, request.num_tokens - self._num_before - 1)
        return sequence

    def _root(self, request: Request) -> bytes:
        """Of the names of a request's blocks. Entries that begin behind its first tokens are made of what the model
        computed of those, with its adapter."""
        if not self._num_before:
            return root_name(self._fingerprint, request.tenant_salt)
        before = b"".join(token_id.to_bytes(4, "little") for token_id in request.token_ids[: self._num_before])
        adapter_digest = b"" if request.adapter is None else request.adapter.digest
        return root_name(self._fingerprint + before, request.tenant_salt, adapter_digest)

    def _name(self, sequence: DraftSequence, token_ids: Sequence[int]) -> None:
        size, names = self._pools.block_size, sequence.block_names
        if len(token_ids) - self._num_before >= (len(names) + 1) * size:
            unnamed = token_ids[len(names) * size + self._num_before :]
            names += block_names(sequence.parent(), unnamed, size, False)

    def note_full_blocks(self, sequence: DraftSequence, token_ids: Sequence[int]) -> None:
        """Name the blocks that are full of the request's tokens, so that other requests find them. A name says which
        tokens come before: so none where some are left out."""
        if sequence.num_left_out:
            return
        self._name(sequence, token_ids)
        full = min(sequence.num_computed // self._pools.block_size, len(sequence.block_names))
        for index in range(sequence.num_registered, full):
            self._pools.register(sequence.block_tables, index, sequence.block_names[index])
            sequence.num_registered = index + 1

    def forget(self, request_id: str) -> None:
        """The request has left; what was computed of it stays as cache."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._pools.release(sequence.block_tables)
            self._free_rows.append(sequence.row)

    def _give_up_oldest(self, used: Collection[str]) -> bool:
        oldest = next((name for name in self._sequences if name not in used), None)
        if oldest is None:
            return False
        self.forget(oldest)
        return True
