"""The tables of all keys as a document: `python -m workers.model.key_tables > docs/checkpoint-keys.md`."""

from __future__ import annotations

import json
import sys

from checkpoint.config_keys import COMMON_KEYS, ROPE_KEYS
from checkpoint.generation_keys import GENERATION_KEYS
from checkpoint.gguf import metadata_keys
from checkpoint.keys import Key, KeyTable
from checkpoint.tokenizer_keys import TOKENIZER_CONFIG_KEYS, TOKENIZER_KEYS
from workers.model.heads.eagle3_config import EAGLE_CONFIG_KEYS, HEAD_KEYS
from workers.model.registry import load_registry

_HEAD = """# What becomes of each key of a checkpoint

Made by `python -m workers.model.key_tables` from the declarations in `checkpoint/` and
`workers/model/`; a test keeps it fresh.

- **understood**: the value is used, or refused where it is out of range.
- **harmless**: the value changes no answer, for the reason given.
- **refused**: the model does not start, and the error names the key, unless the value is null or one of those given.

A key that is not listed is refused, too. A file is read as if the keys in `model.ignore_keys` were not in it.
"""

_GGUF = """`tokenizer.chat_template.NAME` are further templates, of which none is used. Of `general.*` the
architecture, the alignment, the type and some of `general.sampling.*` are used, and `split.count` must be 1; all other
keys are notes. A GGUF's unknown keys cannot be ignored.
"""


def render() -> str:
    """The document in Markdown."""
    tables = {architecture: family.keys for architecture, family in load_registry().families.items()}
    first = next(iter(tables.values()))
    common = {name: key for name, key in first.items() if all(table.get(name) == key for table in tables.values())}
    parts = [_HEAD, _section("config.json, all architectures", common)]
    for architecture, table in tables.items():
        own = {name: key for name, key in table.items() if name not in common}
        parts.append(_section(f"config.json, {architecture} only", own))
    own = {name: key for name, key in HEAD_KEYS.items() if COMMON_KEYS.get(name) != key}
    parts.append(_section("config.json of an EAGLE-3 head, beside those of all architectures", own))
    parts.append(_section("eagle_config of an EAGLE-3 head", EAGLE_CONFIG_KEYS))
    parts += [_section(f"rope_scaling and rope_parameters, rope_type {kind}", t) for kind, t in ROPE_KEYS.items()]
    parts += [
        _section("generation_config.json", GENERATION_KEYS),
        _section("tokenizer_config.json and special_tokens_map.json", TOKENIZER_CONFIG_KEYS),
        "Every other key that ends in `_token` and holds a text is understood, as a name for a chat template.\n",
        _section("tokenizer.json, its top", TOKENIZER_KEYS),
    ]
    for architecture, table in metadata_keys.ARCHITECTURE_KEYS.items():
        parts.append(_section(f"metadata of a GGUF, {architecture}.*", table))
    parts += [_section("metadata of a GGUF, tokenizer.*", metadata_keys.TOKENIZER_KEYS), _GGUF]
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
