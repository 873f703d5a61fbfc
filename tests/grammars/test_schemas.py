"""JSON schemas written by others: what compiles, whether masks agree with instances, and what comes out.

A completion is drawn at random from what the masks allow, which no model would write: if its form is right, so is that
of any model. The counts are printed (`pytest -s`), and stand in the README.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from grammars.compiler import GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar, GrammarKind
from router.service.text import TextCodec
from tests.fake_model import DEMO

VOCAB_SIZE, END_ID = 4096, 0
MASKBENCH = Path(__file__).parents[3] / "shared" / "schemas" / "maskbench_sample.jsonl.gz"
TEST_SUITE = Path(__file__).parent / "json_schema_test_suite.jsonl.gz"
CODEC = TextCodec(DEMO / "tokenizer.json")
MAX_TOKENS = 400


def cases(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def accepts(matcher: Any, instance: object) -> bool:
    matcher = matcher.deep_copy()
    token_ids = list(CODEC.encode(json.dumps(instance, ensure_ascii=False), False))
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def random_completion(matcher: Any, rng: random.Random) -> str | None:
    """None: it did not end in time."""
    matcher, token_ids = matcher.deep_copy(), []
    while len(token_ids) < MAX_TOKENS:
        may_end = matcher.is_accepting()
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:VOCAB_SIZE]
        assert not matcher.is_error()
        allowed = [token_id for token_id in np.flatnonzero(bits).tolist() if token_id != END_ID]
        if may_end and (not allowed or rng.random() < 0.5):
            return CODEC.decode(token_ids)
        token_ids.append(rng.choice(allowed))
        assert matcher.consume_token(token_ids[-1])
    return None


def count(file: Path) -> Counter[str]:
    compiler, rng, found = GrammarCompiler(DEMO / "tokenizer.json", VOCAB_SIZE, [END_ID]), random.Random(7), Counter()
    for case in cases(file):
        try:
            matcher = compiler.matcher(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(case["schema"])))
        except GrammarError as error:
            found["refused"] += 1
            found["refused with a reason"] += bool(str(error))
            continue
        found["compiled"] += 1
        for test in case["tests"]:
            is_accepted = accepts(matcher, test["data"])
            found[f"{'valid' if test['valid'] else 'invalid'} {'accepted' if is_accepted else 'rejected'}"] += 1
        for _ in range(3):
            text = random_completion(matcher, rng)
            found["not ended" if text is None else "completed"] += 1
            if text is not None:
                jsonschema.validate(json.loads(text), case["schema"], cls=jsonschema.Draft202012Validator)
    assert found["refused with a reason"] == found["refused"]
    print(file.name, dict(found))
    return found


def test_maskbench() -> None:
    if not MASKBENCH.is_file():
        pytest.skip("the sample of MaskBench is not beside this checkout")
    found = count(MASKBENCH)
    assert found["invalid accepted"] == 0
    assert found["valid rejected"] == 0
    assert found["compiled"] >= 346 - 3  # of 360; a patch release of the library may differ in a few
    assert found["completed"] > 400


def test_json_schema_test_suite() -> None:
    """Most of its keywords are rare ones. What is rejected though valid has another order of keys, numbers such as 1.0
    for an integer, or a wrong `format`, which the suite does not hold against it and we do."""
    found = count(TEST_SUITE)
    assert found["invalid accepted"] == 0
    assert found["valid rejected"] <= 22
    assert found["compiled"] >= 173 - 5  # of 368
    assert found["completed"] > 400
