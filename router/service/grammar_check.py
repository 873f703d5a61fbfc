"""Whether a grammar can be compiled for this model, asked before a worker is. Knows nothing of requests."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from grammars.compiler import GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar
from router.model_files import ModelFiles
from router.sampling import invalid


class GrammarCheck:
    """Compiles in a thread: others' tokens do not wait for it."""

    def __init__(self, files: ModelFiles, threads: ThreadPoolExecutor) -> None:
        self._compiler = GrammarCompiler(files.tokenizer_json, files.vocab_size, files.eos_token_ids)
        self._threads = threads

    async def check(self, grammar: Grammar | None) -> None:
        """Raise InvalidRequest when it cannot be compiled."""
        if grammar is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._compiler.matcher, grammar)
        except GrammarError as error:
            raise invalid("grammar", str(error)) from None
