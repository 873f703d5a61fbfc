"""Refusals in the words of the client: fields have other names where requests are served."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping

from router.errors import InvalidRequest, is_counted, mark_counted
from router.events import Event

# Of other fields the name is a part of the client's, and stays in the message.
_OTHER_FIELDS = ("prompt", "grammar", "messages", "reasoning_effort", "max_tokens")


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals from inside name the fields that the client knows. names: by the field's name inside."""
    try:
        yield
    except InvalidRequest as error:
        if error.param is None or error.param not in names:
            raise
        param = names[error.param]
        is_other = error.param in _OTHER_FIELDS
        message = error.message.removeprefix(f"{error.param}: ") if is_other else error.message
        renamed = type(error)(f"{param}: {message}", param=param)
        if is_counted(error):
            mark_counted(renamed)
        raise renamed from None


async def refusing(stream: AsyncGenerator[Event, None], names: Mapping[str, str]) -> AsyncGenerator[Event, None]:
    """The events of a stream, whose refusals name the fields that the client knows."""
    with renaming(names):
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                yield event
