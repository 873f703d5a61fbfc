"""Where a model's answers end, and what its requests get that leave sampling open: settled once, from its files.

Knows model files, tokenizer and template; knows nothing of streams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from router.model_files import ModelFiles, SamplingDefaults
from router.sampling import MAX_SEQUENCE_TOKENS, SMALLEST_FLOAT32, SamplingParams, invalid
from router.service.chat import ChatTemplate
from router.service.text import TextCodec


def end_token_ids(files: ModelFiles, codec: TextCodec, template: ChatTemplate | None) -> tuple[int, ...]:
    """The end tokens that workers, who read config.json and generation_config.json, do not know.

    They are tokenizer_config.json's eos_token, and the added token that the chat template writes right after an answer.
    """
    stated = codec.id_of(files.special_tokens.get("eos_token", ""))
    written = codec.added_token_at_start(template.after_answer()) if template is not None else None
    ids = dict.fromkeys(token_id for token_id in (stated, written) if token_id is not None)
    return tuple(i for i in ids if i not in files.eos_token_ids and i < files.vocab_size)


def settled(
    sampling: SamplingParams, defaults: SamplingDefaults, end_ids: Sequence[int], seed: int, num_tokens_left: int
) -> SamplingParams:
    """The options with nothing left open. num_tokens_left: of the context. Settling twice changes nothing.

    Bad words are spelled apart: see with_spelled_words.
    """
    stop_ids = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *end_ids)
    return dataclasses.replace(
        sampling,
        temperature=_first(sampling.temperature, defaults.temperature, 1.0),
        top_p=max(_first(sampling.top_p, defaults.top_p, 1.0), SMALLEST_FLOAT32),  # 0 would leave no candidate
        top_k=int(_first(sampling.top_k, defaults.top_k, 0)),
        min_p=_first(sampling.min_p, defaults.min_p, 0.0),
        typical_p=max(_first(sampling.typical_p, defaults.typical_p, 1.0), SMALLEST_FLOAT32),
        repetition_penalty=_first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_first(sampling.presence_penalty, None, 0.0),
        frequency_penalty=_first(sampling.frequency_penalty, None, 0.0),
        stop_token_ids=tuple(dict.fromkeys(stop_ids)),
        seed=seed if sampling.seed is None else sampling.seed,
        max_tokens=min(sampling.max_tokens or num_tokens_left, num_tokens_left),
    )


def with_spelled_words(sampling: SamplingParams, codec: TextCodec) -> SamplingParams:
    """The options with their bad words among the banned sequences. Raises InvalidRequest. Doing it twice changes
    nothing.

    A word has other tokens at the start of a text than after a space, so each is spelled both ways.
    """
    if not sampling.bad_words:
        return sampling
    spelled = [
        tuple(codec.encode(text, add_special_tokens=False))
        for word in sampling.bad_words
        for text in (word, f" {word.lstrip()}")
    ]
    if (longest := max(len(ids) for ids in spelled)) > MAX_SEQUENCE_TOKENS:
        raise invalid("bad_words", f"a text has at most {MAX_SEQUENCE_TOKENS} tokens, not {longest}")
    sequences = dict.fromkeys((*sampling.banned_sequences, *(ids for ids in spelled if ids)))
    return dataclasses.replace(sampling, banned_sequences=tuple(sequences))


def _first(asked: float | None, default: float | None, otherwise: float) -> float:
    return next(value for value in (asked, default, otherwise) if value is not None)
