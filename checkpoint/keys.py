"""How the keys of a model's JSON files are declared, and the check that no key is passed over in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from checkpoint.errors import CheckpointError

Treatment: TypeAlias = Literal["understood", "harmless", "refused"]

_LONGEST_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True, slots=True)
class Key:
    """What becomes of one key."""

    treatment: Treatment
    why: str
    """What it is used for; why it changes no answer; or what is not supported."""
    neutral: tuple[object, ...] = ()
    """Of a refused key: the values that ask for nothing. null always does."""


KeyTable: TypeAlias = Mapping[str, Key]


def understood(why: str) -> Key:
    """A key whose value is used."""
    return Key("understood", why)


def harmless(why: str) -> Key:
    """A key that changes no answer, whatever its value."""
    return Key("harmless", why)


def refused(why: str, *neutral: object) -> Key:
    """A key that is not supported, but for the values that ask for nothing."""
    return Key("refused", why, neutral)


_IGNORING = "; name it in model.ignore_keys if it changes nothing"


def check_keys(
    raw: Mapping[str, object], table: KeyTable, where: str | Path, way_out: str = "", if_unknown: str = _IGNORING
) -> None:
    """Raise CheckpointError for the first key whose value could change answers and is not used.

    where: what the error begins with. way_out, if_unknown: what else can be done about a key that is not supported, or
    not known.
    """
    for name, value in raw.items():
        if value is None:
            continue
        key = table.get(name)
        if key is None:
            shown = name if name.isprintable() else ascii(name)
            raise CheckpointError(f"{where}: {shown}: unknown key, so what it changes is unknown too{if_unknown}")
        if key.treatment == "refused" and not is_neutral(value, key.neutral):
            raise CheckpointError(f"{where}: {name}={_shown(value)} is not supported: {key.why}{way_out}")


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether a value is one of these, as JSON compares: 1 equals 1.0, but not true."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
