"""The tables of all keys as a document: `python -m checkpoint.table > docs/checkpoint-keys.md`."""

from __future__ import annotations

import json
import sys

from checkpoint.config_keys import CONFIG_KEYS, ROPE_KEYS
from checkpoint.generation_keys import GENERATION_KEYS
from checkpoint.keys import Key, KeyTable
from checkpoint.tokenizer_keys import TOKENIZER_CONFIG_KEYS, TOKENIZER_KEYS

_HEAD = """# What becomes of each key of a checkpoint

Made by `python -m checkpoint.table` from the declarations in `checkpoint/`; a test keeps it fresh.

- **understood**: the value is used, or refused where it is out of range.
- **harmless**: the value changes no answer, for the reason given.
- **refused**: the model does not start, and the error names the key, unless the value is null or one of those given.

A key that is not listed is refused, too. A file is read as if the keys in `model.ignore_keys` were not in it.
"""


def render() -> str:
    """The document in Markdown."""
    architectures = list(CONFIG_KEYS)
    common = {
        name: key
        for name, key in CONFIG_KEYS[architectures[0]].items()
        if all(CONFIG_KEYS[other].get(name) == key for other in architectures)
    }
    parts = [_HEAD, _section("config.json, all architectures", common)]
    for architecture in architectures:
        own = {name: key for name, key in CONFIG_KEYS[architecture].items() if name not in common}
        parts.append(_section(f"config.json, {architecture} only", own))
    parts += [_section(f"rope_scaling and rope_parameters, rope_type {kind}", t) for kind, t in ROPE_KEYS.items()]
    parts += [
        _section("generation_config.json", GENERATION_KEYS),
        _section("tokenizer_config.json and special_tokens_map.json", TOKENIZER_CONFIG_KEYS),
        "Every other key that ends in `_token` and holds a text is understood, as a name for a chat template.\n",
        _section("tokenizer.json, its top", TOKENIZER_KEYS),
    ]
    return "\n".join(parts)


def _section(title: str, table: KeyTable) -> str:
    rows = [f"| `{name}` | {key.treatment} | {_reason(key)} |" for name, key in sorted(table.items())]
    return "\n".join([f"## {title}", "", "| key | | why |", "| --- | --- | --- |", *rows, ""])


def _reason(key: Key) -> str:
    if not key.neutral:
        return key.why
    return f"{key.why} (accepted: {', '.join(f'`{json.dumps(value)}`' for value in key.neutral)})"


if __name__ == "__main__":
    sys.stdout.write(render())
