"""No pattern of an adapter's config can stop who matches it, and no value of the config raises an untyped error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.adapters.config import read_config
from checkpoint.adapters.patterns import MAX_NAME_CHARACTERS, MAX_PATTERN_CHARACTERS, problem_of
from checkpoint.errors import CheckpointError
from checkpoint.files import parse_json

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
PATH = Path("/adapters/a/adapter_config.json")
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.experts.3.down_proj", "a" * MAX_NAME_CHARACTERS)

TAKEN = [
    r".*layers\.[02]\.self_attn\.(q|v)_proj",
    r"^model.layers.2.*down_proj",
    r"(?!.*vision).*(self_attn|mlp).*(q_proj|k_proj|v_proj|o_proj)",
    r".*layers\.(0|1|2|3|10|11|12|20|21)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"model\.layers\.\d+\.(?:self_attn\.)?[qkv]_proj$",
    r"(?i).*\.Q_PROJ",
]
REFUSED = {
    r"(([a-z0-9_.]+)+)+!": "has a repeat or alternatives within a repeat",
    r"(a|aa)*!": "has a repeat or alternatives within a repeat",
    r"(?:(?:a{9}){9})!": "has a repeat or alternatives within a repeat",
    r"(?=(a+)+!)a": "has a repeat or alternatives within a repeat",
    r".*.*.*.*!": "can match a name in too many ways",
    "a?" * 30 + "a" * 30: "can match a name in too many ways",
    "(?:a|a)" * 40 + "!": "can match a name in too many ways",
    "(?i)" + "(?:ab|AB)" * 40 + "!": "can match a name in too many ways",
    "(?:ab|ab)" * 40 + "!": "can match a name in too many ways",
    r"(?:\b){4000000000}": "repeats something at least 4000000000 times",
    "a" * (MAX_PATTERN_CHARACTERS + 1): "has 1001 characters; at most 1000",
    "(a": "is not a regular expression",
    "(" * 400 + ")" * 400: "has 400 brackets; at most 50",
    r"a{99999999999}": "is not a regular expression",
}  # fmt: skip


@pytest.mark.parametrize("pattern", TAKEN)
def test_patterns_of_real_adapters_are_taken(pattern: str) -> None:
    assert problem_of(pattern) == ""


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:20])
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    found = problem_of(pattern)
    assert found.startswith(REFUSED[pattern])
    with pytest.raises(CheckpointError, match=rf"^{PATH}: target_modules: ") as refused:
        read_config({**GOOD, "target_modules": pattern}, PATH)
    assert found in str(refused.value)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [r"(([a-z0-9_.]+)+)+!", "(?i)q_proj", "a)(b"])
def test_keys_are_checked_within_what_they_are_matched_in(key: str, pattern: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{PATH}: {key}: "):
        read_config({**GOOD, key: {pattern: 2}}, PATH)


_PIECES = st.sampled_from([*"ab.*+?()|[]{}^$\\,=!:<>1", ".*", "a+", "(?:", "(?=", "{2,}", "q_proj", r"\1"])
_PATTERNS = st.lists(_PIECES, max_size=25).map("".join)


@given(_PATTERNS)
def test_what_is_taken_matches_soon(pattern: str) -> None:
    """Hangs where it does not: the suite's time limit ends it."""
    if not problem_of(pattern):
        for name in NAMES:
            re.fullmatch(pattern, name)


_NUMBERS = st.integers(-(10**400), 10**400) | st.just(10**400) | st.floats()
_SCALARS = st.none() | st.booleans() | _NUMBERS | st.text() | _PATTERNS
_VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(_PATTERNS | st.text(), v, max_size=3)
)
_KEYS = st.sampled_from([
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "base_model_name_or_path", "bias", "init_lora_weights", "layers_to_transform",
])  # fmt: skip


@given(st.dictionaries(_KEYS | st.text(), _VALUES, max_size=4))
def test_whatever_a_config_says_it_is_taken_or_refused_in_one_line(changes: dict[str, Any]) -> None:
    config, message = None, ""
    try:
        config = read_config(parse_json(json.dumps({**GOOD, **changes}).encode(), PATH), PATH)
    except CheckpointError as error:
        message = str(error)
    if config is None:
        assert message.startswith(str(PATH))
        assert len(message.splitlines()) == 1
        assert message.encode()
        return
    for name in NAMES:
        config.is_target(name)
        assert config.rank_of(name) >= 1
        assert isinstance(config.scale_of(name), float)


@pytest.mark.parametrize(
    ("key", "value"), [("lora_alpha", 10**400), ("lora_alpha", float("inf")), ("r", 10**400), ("r", 2**20 + 1)]
)
def test_numbers_beyond_all_sense_are_refused_by_field(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^{PATH}: {key}: .* is not a"):
        read_config({**GOOD, key: value}, PATH)
