"""Names of a request's blocks, made as its tokens become known. See kvstore.names."""

from __future__ import annotations

from kvstore.names import block_name, block_names, root_name
from workers.engine.request import Request


class RequestNames:
    """Under one model's fingerprint and one block size."""

    def __init__(self, kv_fingerprint: bytes, block_size: int) -> None:
        self._fingerprint = kv_fingerprint
        self._block_size = block_size

    def extend(self, request: Request) -> None:
        """Names of the blocks that are full now; all new ones in one pass, since a prompt may have thousands."""
        size, names = self._block_size, request.block_names
        if request.num_tokens >= (len(names) + 1) * size:
            names += block_names(self._parent(request, names), request.token_ids[len(names) * size :], size, False)

    def of_prompt(self, request: Request) -> list[bytes]:
        """Names of the blocks that prefill publishes: full ones, and the tail named by exactly its tokens."""
        return self._of_first(request, request.num_given_tokens)

    def to_pull(self, request: Request) -> list[bytes]:
        """Names of the blocks that may be pulled: the prompt's, and after a swap those of what was generated."""
        return self._of_first(request, request.num_pull_tokens)

    def _of_first(self, request: Request, num_tokens: int) -> list[bytes]:
        size = self._block_size
        full, rest = divmod(num_tokens, size)
        names = request.block_names[:full]
        if rest:
            tail = request.token_ids[full * size : num_tokens]
            names.append(block_name(self._parent(request, names), tail))
        return names

    def _parent(self, request: Request, names: list[bytes]) -> bytes:
        if names:
            return names[-1]
        adapter_digest = b"" if request.adapter is None else request.adapter.digest
        return root_name(self._fingerprint, request.tenant_salt, adapter_digest)
