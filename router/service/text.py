"""Between text and token ids: encoding, decoding as tokens come, and stop texts.

A detokenizer never shows half a character. All it shows together is the text that decoding prompt and completion at
once has after the prompt's. Knows nothing of requests, models or streams.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from router.errors import ModelFilesError
from router.parsers.lexer import overlap

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 8  # a character takes at most 4 bytes, so an incomplete end longer than this is no character
_MAX_CONTEXT_TOKENS = 32  # of the prompt, those with text that a detokenizer starts from
_MAX_LOOKED_AT_TOKENS = 256  # of the prompt, to find them among special tokens
_NOTHING: Mapping[int, str] = {}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Detokenizer(Protocol):
    """Text of a growing list of ids, which a prompt comes before."""

    def push(self, token_ids: Sequence[int]) -> str:
        """More ids came: the text that is complete now."""
        ...

    def finish(self) -> str:
        """No more will come: what was held back. An incomplete character shows as U+FFFD."""
        ...


class TextCodec:
    """One model's tokenizer. Thread-safe; encoding lets go of the interpreter lock."""

    def __init__(self, tokenizer_json: Path) -> None:
        try:
            content = tokenizer_json.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ModelFilesError(f"{tokenizer_json}: not a tokenizer ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        layout = json.loads(content)
        if dropout := layout["model"].get("dropout"):  # for training; a text would have other ids each time
            raise ModelFilesError(f"{tokenizer_json}: model.dropout must be null, not {dropout!r}")
        self._is_byte_level = _is_byte_level(layout.get("decoder"))
        added = layout.get("added_tokens") or []
        self._special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self._added_ids = {token["content"]: token["id"] for token in added}
        self._bytes_of: dict[int, bytes] = {}  # filled as ids are seen
        self._longest_token_bytes = self._bound_token_bytes(layout)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text. Takes about a microsecond per byte or two: long texts belong in a thread."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of all ids at once, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def spelled(self, token_ids: Sequence[int]) -> str:
        """As decode, with special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_of(self, token_id: int) -> str:
        """An id's own spelling in the vocabulary; "" for one that stands for nothing."""
        return self._tokenizer.id_to_token(token_id) or ""

    def min_tokens(self, num_bytes: int) -> int:
        """No text of so many bytes has fewer tokens; 0 where the tokenizer allows no such bound."""
        return num_bytes // self._longest_token_bytes if self._longest_token_bytes else 0

    def detokenizer(self, prompt_ids: Sequence[int] = (), shown: Mapping[int, str] = _NOTHING) -> Detokenizer:
        """A fresh one, for the completion of this prompt. shown: what it shows of special tokens, by id."""
        context = self._last_with_text(prompt_ids)
        kind = _ByteDetokenizer if self._is_byte_level else _WindowDetokenizer
        return kind(self, context, shown)

    def added_tokens(self, markers: Iterable[str]) -> Mapping[str, int]:
        """The ids of those markers that are added tokens."""
        return {marker: self._added_ids[marker] for marker in markers if marker in self._added_ids}

    def special_markers(self, markers: Iterable[str]) -> Mapping[int, str]:
        """Those markers that are special tokens, by id."""
        ids = self.added_tokens(markers)
        return {token_id: marker for marker, token_id in ids.items() if self.is_special(token_id)}

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, by its own spelling."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def added_token_at_start(self, text: str) -> int | None:
        """The id of the added token that a text begins with, the longest of several; None when it begins with none.

        Spaces and line breaks, which some vocabularies have as added tokens, do not count.
        """
        found = [token for token in self._added_ids if token.strip() and text.startswith(token)]
        return self._added_ids[max(found, key=len)] if found else None

    def fallback_byte(self, token_id: int) -> int | None:
        """The byte that an id of a vocabulary with byte fallback stands for; None for all other ids."""
        spelled = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return int(spelled[1], 16) if spelled else None

    def is_special(self, token_id: int) -> bool:
        """Whether an id has no text of its own."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one id of a byte-level tokenizer stands for; nothing for a special or an unknown one."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._spell(token_id)
        return known

    def bytes_alone(self, token_id: int) -> bytes:
        """What one id says by itself, special ones included; its neighbours may make it something else."""
        if self._is_byte_level and not self.is_special(token_id):
            return self.token_bytes(token_id)
        byte = self.fallback_byte(token_id)
        if byte is not None:
            return bytes((byte,))
        return str(self._tokenizer.id_to_token(token_id) or "").replace("\u2581", " ").encode()

    def _last_with_text(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last ids that have text, so many that what is to the left of them changes nothing."""
        looked_at = islice(reversed(prompt_ids), _MAX_LOOKED_AT_TOKENS)
        with_text = (token_id for token_id in looked_at if not self.is_special(token_id))
        context = list(islice(with_text, _MAX_CONTEXT_TOKENS))[::-1]
        if len(context) == _MAX_CONTEXT_TOKENS and not self._is_byte_level:
            while context and 0x80 <= (self.fallback_byte(context[0]) or 0) < 0xC0:  # the end of a character cut in two
                context.pop(0)
        return context

    def _spell(self, token_id: int) -> bytes:
        token = None if self.is_special(token_id) else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token, spelled as itself
            return str(token).encode()

    def _bound_token_bytes(self, layout: dict[str, object]) -> int:
        # A normalizer may shorten a text, an added token may swallow the spaces around it, an unknown token may stand
        # for any length: only without these does every token cover at most its own bytes.
        added = layout.get("added_tokens") or []
        assert isinstance(added, list)
        swallows = any(token.get("lstrip") or token.get("rstrip") for token in added)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        has_all_bytes = all(character in vocabulary for character in _BYTE_OF_CHARACTER)
        if not self._is_byte_level or layout.get("normalizer") is not None or swallows or not has_all_bytes:
            return 0
        return max(len(token.encode()) for token in vocabulary)


class _ByteDetokenizer:
    """For byte-level vocabularies: every id is some bytes, and a character is shown when its last byte came."""

    def __init__(self, codec: TextCodec, context: Sequence[int], shown: Mapping[int, str]) -> None:
        self._codec = codec
        self._shown = {token_id: text.encode() for token_id, text in shown.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.push(context)  # the prompt's own text; an incomplete character at its end is kept

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        return self._shown.get(token_id) or self._codec.token_bytes(token_id)


class _WindowDetokenizer:
    """For all other vocabularies, where a token's text depends on its neighbours: decodes a short window twice.

    ids[:_shown] are shown, or are the prompt's; special ones are left out. The window starts one shown piece earlier,
    so that what is decoded has its left neighbours; the new text is what the longer window has more than the shorter.
    """

    def __init__(self, codec: TextCodec, context: Sequence[int], spelled: Mapping[int, str]) -> None:
        self._codec = codec
        self._spelled = spelled
        self._ids = list(context)
        self._start = 0
        self._shown = len(context) - self._num_pending()

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            if token_id in self._spelled:
                text += self._advance(is_last=True) + self._spelled[token_id]
            elif not self._codec.is_special(token_id):  # it would make the window longer and show nothing
                self._ids.append(token_id)
                text += self._advance(is_last=False)
        return text

    def finish(self) -> str:
        return self._advance(is_last=True)

    def _num_pending(self) -> int:
        """How many ids at the end are the first bytes of a character that is not complete."""
        data = b""
        for token_id in islice(reversed(self._ids), 3):
            byte = self._codec.fallback_byte(token_id)
            if byte is None:
                break
            data = bytes((byte,)) + data
            try:
                return 0 if codecs.getincrementaldecoder("utf-8")().decode(data) else len(data)
            except UnicodeDecodeError:
                continue  # it does not begin here
        return 0

    def _advance(self, is_last: bool) -> str:
        before = self._codec.decode(self._ids[self._start : self._shown])
        after = self._codec.decode(self._ids[self._start :])
        is_incomplete = after.endswith(_REPLACEMENT) and len(self._ids) - self._shown < _MAX_PENDING_TOKENS
        if len(after) <= len(before) or (is_incomplete and not is_last):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


class StopTexts:
    """Watches a growing text for the first of some stop texts; holds back what may become one."""

    def __init__(self, stops: Sequence[str], shows_stop: bool = False) -> None:
        self._stops = stops
        self._shows_stop = shows_stop
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """More text came: the part that may be shown. After a hit, nothing."""
        if self.is_hit:
            return ""
        text = self._held + text
        hits = [(index, len(stop)) for stop in self._stops if (index := text.find(stop)) >= 0]
        if hits:
            self.is_hit = True
            self._held = ""
            first, length = min(hits)
            return text[: first + length if self._shows_stop else first]
        num_held = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """No more will come: what was held back was no stop text."""
        held, self._held = self._held, ""
        return held


def _is_byte_level(decoder: object) -> bool:
    """Whether a tokenizer's decoder joins the bytes that the characters of its tokens stand for, and does no more."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence" and len(decoder.get("decoders") or ()) == 1:
        return _is_byte_level(decoder["decoders"][0])
    return decoder.get("type") == "ByteLevel"


def _byte_characters() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, other bytes for the characters from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_characters()
