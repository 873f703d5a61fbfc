"""From a request to what goes to workers: checked, encoded, its blocks named, with nothing left open.

Knows the model's files, its tokenizer and the layouts of the workers' blocks; knows nothing of streams or clients.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from router.adapters.catalog import AdapterCatalog
from router.events import AdapterRef, GenerationRequest
from router.fleet.fleet import BlockNames, Fleet, KvLayout, name_blocks
from router.model_files import ModelFiles
from router.sampling import check_choice_is_left, check_sampling, check_text, check_token_ids
from router.service.checks import check_priority, check_prompt, check_prompt_logprobs, check_salt
from router.service.defaults import settled, with_spelled_words
from router.service.grammar_check import GrammarCheck
from router.service.text import TextCodec
from router.service.token_request import TokenRequest, block_salt

_INLINE_BYTES = 16 * 1024  # shorter prompts are encoded at once, longer ones in a thread
_ENCODE_THREADS = 2


@dataclass(frozen=True, slots=True)
class PreparationContext:
    """What all requests of a router have in common."""

    files: ModelFiles
    codec: TextCodec
    end_token_ids: Sequence[int]  # that workers do not know
    fleet: Fleet
    clock: Callable[[], float]  # the dispatcher's
    request_timeout_s: float  # 0 means none
    adapters: AdapterCatalog


class Preparation:
    """Prepares the requests of one router."""

    def __init__(self, context: PreparationContext) -> None:
        self.files, self.codec, self.end_token_ids = context.files, context.codec, context.end_token_ids
        self._context = context
        self._threads = ThreadPoolExecutor(_ENCODE_THREADS, thread_name_prefix="encode")
        self._grammars = GrammarCheck(context.files, self._threads)

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and completion together: the model's limit, or a lower one of a worker."""
        limit = self._context.fleet.context_tokens
        return self.files.context_tokens if limit is None else min(limit, self.files.context_tokens)

    async def check_model(self, name: str) -> AdapterRef | None:
        """The adapter of that name; None for the name of the model, or an empty one. Waits for an adapter that is being
        loaded. Raises UnknownModel, AdapterAway."""
        return None if name in ("", self.files.name) else await self._context.adapters.find(name)

    async def with_adapter(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the adapter that it names. Raises as check_model."""
        adapter = await self.check_model(request.model)
        return request if adapter is None else dataclasses.replace(request, adapter=adapter)

    def check(self, request: GenerationRequest) -> int:
        """All that can be said before encoding; the prompt's size in bytes. The model's name is checked apart."""
        check_sampling(request.sampling, self.files.vocab_size)
        check_salt(request.cache_salt)
        check_priority(request.priority)
        if isinstance(request.prompt, str):
            return check_text("prompt", request.prompt)
        check_prompt(len(request.prompt), self.context_tokens)
        check_token_ids("prompt", request.prompt, self.files.vocab_size)
        return 4 * len(request.prompt)

    async def order(self, request: GenerationRequest, weights: str) -> TokenRequest:
        """What goes to workers that have these weights. Raises InvalidRequest."""
        arrived_s = self._context.clock()
        await self._grammars.check(request.sampling.grammar)
        context_tokens = self.context_tokens
        layouts = self._context.fleet.layouts
        if isinstance(request.prompt, str):
            num_tokens = max(1, self.codec.min_tokens(len(request.prompt.encode())))
            check_prompt(num_tokens, context_tokens, is_bound=True)
        salt = block_salt(request.tenant_salt, request.cache_salt)
        digest = b"" if request.adapter is None else request.adapter.digest
        token_ids, names = await self.encode(request.prompt, request.add_special_tokens, layouts, salt, digest)
        check_prompt(len(token_ids), context_tokens)
        check_token_ids("prompt", token_ids, self.files.vocab_size)
        check_prompt_logprobs(request.sampling.prompt_logprobs, len(token_ids))
        num_tokens_left = context_tokens - len(token_ids)
        asked = with_spelled_words(request.sampling, self.codec)
        end_ids = (*self.end_token_ids, *self.files.eos_token_ids)
        check_choice_is_left(asked, end_ids, self.files.vocab_size)
        seed = secrets.randbits(53)  # 53: exact in any JSON reader
        return TokenRequest(
            stream_id=secrets.token_hex(12),
            token_ids=token_ids,
            sampling=settled(asked, self.files.sampling_defaults, self.end_token_ids, seed, num_tokens_left),
            names=names,
            arrived_s=arrived_s,
            deadline_s=self._deadline_s(request, arrived_s),
            tenant_salt=salt,
            tenant=request.tenant_salt,
            priority=request.priority,
            weights=weights,
            adapter=request.adapter,
        )

    def _deadline_s(self, request: GenerationRequest, now_s: float) -> float | None:
        limits = [request.deadline_s, self._context.request_timeout_s or None]
        set_limits = [limit for limit in limits if limit is not None]
        return now_s + min(set_limits) if set_limits else None

    async def encode(
        self,
        prompt: str | tuple[int, ...],
        add_special_tokens: bool,
        layouts: frozenset[KvLayout] = frozenset(),
        tenant_salt: bytes = b"",
        adapter: bytes = b"",
    ) -> tuple[Sequence[int], BlockNames]:
        """Ids and block names of a prompt; those of a long one in a thread, so that other streams get their tokens."""

        def encode() -> tuple[Sequence[int], BlockNames]:
            ids = self.codec.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
            return ids, name_blocks(layouts, ids, tenant_salt, adapter)

        if len(prompt) < _INLINE_BYTES // 4:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens as they are spelled. Raises InvalidRequest."""
        check_token_ids("tokens", token_ids, self.files.vocab_size)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.codec.spelled, token_ids)

    def close(self) -> None:
        """Give up the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
