"""The table of request options says what the schema does, and the page what the table says."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from router.api.openai.options import OPTIONS, Api, Option, Use, render
from router.api.openai.schema import ChatRequest, CompletionRequest, parse
from router.errors import InvalidRequest
from router.sampling import SamplingParams

PAGE = Path(__file__).parents[3] / "docs" / "request-options.md"
BODIES: dict[Api, tuple[Any, dict[str, Any]]] = {
    Api.COMPLETIONS: (CompletionRequest, {"model": "m", "prompt": "x"}),
    Api.CHAT: (ChatRequest, {"model": "m", "messages": []}),
}


def kinds_of(option: Option) -> list[Api]:
    return [api for api in BODIES if option.api in (api, Api.BOTH)]


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == render(), "python -m router.api.openai.options > docs/request-options.md"


def test_the_served_options_are_the_fields_of_the_schema() -> None:
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for api, (kind, _) in BODIES.items():
        served = {option.name for option in OPTIONS if option.use is Use.SERVED and api in kinds_of(option)}
        assert served == set(kind.model_fields), api
    names = {option.name for option in OPTIONS if option.use is Use.SERVED}
    assert {field.name for field in fields(SamplingParams)} - {"grammar"} <= names  # which has several names here


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.use is not Use.SERVED], ids=lambda option: option.name)
def test_an_option_is_passed_over_or_refused_by_name(option: Option) -> None:
    for api, (kind, body) in BODIES.items():
        if api not in kinds_of(option):
            with pytest.raises(InvalidRequest, match="is not a field of this request"):
                parse(kind, {**body, option.name: None})
            continue
        for value in (None, *(json.loads(text) for text in option.neutral)):
            parse(kind, {**body, option.name: value})
        changing = {**body, option.name: {"x": ["y" * 500]}}
        if option.use is Use.IGNORED:
            parse(kind, changing)
        else:
            with pytest.raises(InvalidRequest) as refusal:
                parse(kind, changing)
            assert refusal.value.param == option.name
            assert option.note in refusal.value.message
            assert len(refusal.value.message) < 300


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10_000}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_conflicting_options_of_chats_are_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(ChatRequest, {"model": "m", "messages": [], **change}).sampling(None)
    assert refusal.value.param == param
