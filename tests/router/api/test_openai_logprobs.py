"""The shapes that OpenAI gives logprobs."""

from __future__ import annotations

from openai.types.chat.chat_completion import ChoiceLogprobs

from router.api.openai.logprobs import LEAST_LOGPROB, LogprobsOut
from router.events import TokenLogprobs, Tokens

SPELLED = {1: b"the", 2: b"\xc3", 3: b"\xa9", 4: b" x"}


def event(first: int, *ids: int) -> Tokens:
    logprobs = [TokenLogprobs(-0.5 * token_id, (1, token_id), (-0.25, -0.5 * token_id)) for token_id in ids]
    return Tokens(first, ids, "", tuple(logprobs))


def test_chats_have_objects_with_bytes() -> None:
    shown = LogprobsOut(SPELLED.__getitem__, is_chat=True).shown([event(0, 1, 2), event(2, 3)])
    parsed = ChoiceLogprobs.model_validate(shown)
    assert parsed.content is not None
    assert [one.token for one in parsed.content] == ["the", "\ufffd", "\ufffd"]
    assert [one.bytes for one in parsed.content] == [[116, 104, 101], [0xC3], [0xA9]]
    assert [[top.logprob for top in one.top_logprobs] for one in parsed.content][1] == [-0.25, -1.0]


def test_completions_have_lists_that_go_on_from_chunk_to_chunk() -> None:
    out = LogprobsOut(SPELLED.__getitem__, is_chat=False, num_characters=5)
    first, second = out.shown([event(0, 1)]), out.shown([event(1, 4)])
    assert (first["text_offset"], second["text_offset"]) == ([5], [8])
    assert second["top_logprobs"] == [{"the": -0.25, " x": -2.0}]
    impossible = Tokens(2, (1,), "", (TokenLogprobs(float("-inf")),))
    assert out.shown([impossible])["token_logprobs"] == [LEAST_LOGPROB]
    assert out.shown([impossible])["top_logprobs"] == [None]
