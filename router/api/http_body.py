"""The body of an HTTP request as JSON: bounded as it comes, and again once it is decompressed."""

from __future__ import annotations

import asyncio
import json
import zlib

from starlette.requests import ClientDisconnect, Request

from router.errors import Cancelled, InvalidRequest, PromptTooLarge, UnsupportedEncoding

_INLINE_BYTES = 64 * 1024  # shorter bodies are parsed at once
_DRAINED_BODY_FACTOR = 4  # of a body that is too large this much is read, so that the client gets to see the answer
_WINDOW_BITS = {
    "gzip": (16 + zlib.MAX_WBITS,),
    "x-gzip": (16 + zlib.MAX_WBITS,),
    "deflate": (zlib.MAX_WBITS, -zlib.MAX_WBITS),  # with zlib's header; some clients leave it out
}


async def read_json(request: Request, max_bytes: int) -> object:
    """The body as JSON. Raises InvalidRequest, PromptTooLarge or UnsupportedEncoding."""
    body, encoding = await _read(request, max_bytes), request.headers.get("content-encoding", "")
    if len(body) <= _INLINE_BYTES and not encoding:
        return _parse(body)
    # A body of 16 MiB takes a tenth of a second, in which no other stream would get its tokens.
    return await asyncio.to_thread(lambda: _parse(_decompressed(body, encoding, max_bytes)))


def _parse(data: bytes) -> object:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"request body: not valid UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"request body: not valid JSON ({error})") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = PromptTooLarge(f"request body: more than the {max_bytes} bytes this router accepts")
    if int(request.headers.get("content-length", 0)) > max_bytes:  # that it is a number was checked by the server
        raise too_large  # before a byte is read: a client that waits for "100 Continue" sends none; others' are dropped
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= max_bytes:
                chunks.append(chunk)
            elif num_bytes > _DRAINED_BODY_FACTOR * max_bytes:
                break
    except ClientDisconnect:
        raise Cancelled("the client went away while sending its request") from None
    if num_bytes > max_bytes:
        raise too_large
    return b"".join(chunks)


def _decompressed(data: bytes, content_encoding: str, max_bytes: int) -> bytes:
    """The data without its Content-Encoding; never more than one byte beyond max_bytes is made of it."""
    encodings = [name.strip().lower() for name in content_encoding.split(",")]
    encodings = [name for name in encodings if name not in ("", "identity")]
    if not encodings:
        return data
    if len(encodings) > 1 or encodings[0] not in _WINDOW_BITS:
        known = ", ".join(_WINDOW_BITS)
        raise UnsupportedEncoding(f"Content-Encoding: {content_encoding!r} is not supported (supported: {known})")
    for window_bits in _WINDOW_BITS[encodings[0]]:
        plain, rest = b"", data
        try:
            while rest:  # a gzip file may be several, one behind the other (RFC 1952)
                inflater = zlib.decompressobj(window_bits)
                plain += inflater.decompress(rest, max_bytes + 1 - len(plain))
                if len(plain) > max_bytes:
                    raise PromptTooLarge(
                        f"request body: decompressed, more than {max_bytes} bytes, the most accepted here"
                    )
                if not inflater.eof:
                    break
                rest = inflater.unused_data
        except zlib.error:
            continue
        if data and not rest:
            return plain
    raise InvalidRequest(f"request body: not one complete {encodings[0]} stream")
