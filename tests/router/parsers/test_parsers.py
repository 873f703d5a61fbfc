"""What the parsers make of answers: the calls, reasoning and content of each family, however the text is cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning
from router.parsers.families import (
    DEEPSEEK,
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    AnswerFormat,
    Family,
    family_of,
)
from tests.router import chat_templates

NAMES = frozenset(("f", "get_weather"))
THINK = ("<think>", "</think>")
FAMILIES = {
    "hermes": Family(HERMES),
    "hermes_think": Family(HERMES, THINK),
    "llama": Family(LLAMA),
    "mistral": Family(MISTRAL, ("[THINK]", "[/THINK]")),
    "deepseek": Family(DEEPSEEK, THINK),
    "harmony": Family(HARMONY),
    "think": Family(None, THINK),
}
D_BEGIN, D_CALL, D_SEP, D_END, D_ALL_END = DEEPSEEK.markers

Call = tuple[str, str]
Parsed = tuple[str, str, tuple[Call, ...]]
"""Content, reasoning, and calls with their arguments."""


def folded(deltas: Iterable[Delta]) -> Parsed:
    content, reasoning, calls = "", "", []
    for delta in deltas:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, Reasoning):
            reasoning += delta.text
        elif isinstance(delta, CallStart):
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        else:
            assert isinstance(delta, CallArguments)
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return content, reasoning, tuple(calls)


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbours of one kind joined: what does not depend on the cut."""
    out: list[Delta] = []
    for delta in deltas:
        last = out[-1] if out else None
        if isinstance(delta, Content) and isinstance(last, Content):
            out[-1] = Content(last.text + delta.text)
        elif isinstance(delta, Reasoning) and isinstance(last, Reasoning):
            out[-1] = Reasoning(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments) and last.index == delta.index:
            out[-1] = CallArguments(last.index, last.text + delta.text)
        else:
            out.append(delta)
    return out


def pieces_of(answer_format: AnswerFormat, pieces: Sequence[str], hidden: Sequence[str] = ()) -> list[list[Delta]]:
    """What each piece gave, and the end."""
    parser = answer_format.parser("stream", hidden)
    return [*(list(parser.push(piece)) for piece in pieces), list(parser.finish())]


def parsed(family: str, text: str, hidden: Sequence[str] = (), **options: bool) -> Parsed:
    answer_format = AnswerFormat(FAMILIES[family], NAMES, **options)
    whole = merged(itertools.chain(*pieces_of(answer_format, [text], hidden)))
    assert merged(itertools.chain(*pieces_of(answer_format, list(text), hidden))) == whole
    return folded(whole)


def calls(*named: Call) -> tuple[Call, ...]:
    return named


ARGS = '{"city": "Köln }{ \\"x\\" \\\\", "n": [1, {"a": null}], "b": true}'
CALLED = [
    ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {ARGS}}}\n</tool_call>', ("", "", calls(("f", ARGS)))),
    ("hermes", f'<tool_call>{{"arguments": {ARGS}, "name": "f"}}</tool_call>', ("", "", calls(("f", ARGS)))),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("", "", calls(("f", "{}")))),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", "", calls(("f", "{}")))),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", (("f", '{"a": 1}'),))),
    ("hermes", '<tool_call>{"id": 7, "name": "f", "arguments": {}}</tool_call>', ("", "", (("f", "{}"),))),
    (
        "hermes",
        'Look.\n<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>\n',
        ("Look.", "", calls(("f", '{"a": "</tool_call>"}'), ("get_weather", "{}"))),
    ),
    (
        "hermes_think",
        f'<think>\nWhat?\n\nAh.\n</think>\n\nYes.\n<tool_call>{{"name": "f", "arguments": {ARGS}}}</tool_call>',
        ("Yes.", "What?\n\nAh.", calls(("f", ARGS))),
    ),
    ("llama", f'{{"name": "f", "parameters": {ARGS}}}', ("", "", calls(("f", ARGS)))),
    ("llama", f'<|python_tag|>{{"type": "function", "name": "f", "parameters": {ARGS}}}', ("", "", (("f", ARGS),))),
    (
        "llama",
        '{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {"a": 1}}\n',
        ("", "", calls(("f", "{}"), ("get_weather", '{"a": 1}'))),
    ),
    ("llama", 'So: <|python_tag|>{"name": "f", "parameters": {}}', ("So:", "", calls(("f", "{}")))),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {ARGS}, "id": "abcd12345"}}, {{"name": "f", "arguments": {{}}}}]',
        ("", "", calls(("f", ARGS), ("f", "{}"))),
    ),
    ("mistral", f"[TOOL_CALLS]f[ARGS]{ARGS}", ("", "", calls(("f", ARGS)))),
    ("mistral", f"[TOOL_CALLS]f{ARGS}", ("", "", calls(("f", ARGS)))),
    (
        "mistral",
        "Well.[TOOL_CALLS]f[CALL_ID]abcd12345[ARGS]{}[TOOL_CALLS]get_weather[ARGS]" + ARGS,
        ("Well.", "", calls(("f", "{}"), ("get_weather", ARGS))),
    ),
    ("mistral", "[THINK]Hm.[/THINK]Well.[TOOL_CALLS]f[ARGS]{}", ("Well.", "Hm.", calls(("f", "{}")))),
    (
        "deepseek",
        f"Look.\n{D_BEGIN}{D_CALL}function{D_SEP}f\n```json\n{ARGS}\n```{D_END}\n"
        f"{D_CALL}function{D_SEP}get_weather\n```json\n{{}}\n```{D_END}{D_ALL_END}",
        ("Look.", "", calls(("f", ARGS), ("get_weather", "{}"))),
    ),
    (
        "deepseek",
        f"<think>Hm.</think>{D_BEGIN}\n{D_CALL}f{D_SEP}{ARGS}{D_END}{D_CALL}f{D_SEP}{{}}{D_END}{D_ALL_END}",
        ("", "Hm.", calls(("f", ARGS), ("f", "{}"))),
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        f"<|constrain|>json<|message|>{ARGS}<|call|>",
        ("", "Hm.", calls(("f", ARGS))),
    ),
    (
        "harmony",
        " to=functions.f<|channel|>commentary<|constrain|>json<|message|> {}",  # <|call|> ends it, unseen
        ("", "", calls(("f", "{}"))),
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary json"
        "<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>Done.<|return|>",
        ("I look.\nDone.", "", calls(("f", "{}"))),
    ),
]


@pytest.mark.parametrize(("family", "text", "expected"), CALLED)
def test_calls_are_found(family: str, text: str, expected: Parsed) -> None:
    assert parsed(family, text) == expected
    for _, arguments in expected[2]:
        json.loads(arguments)


@pytest.mark.parametrize(("family", "text", "expected"), CALLED)
def test_special_markers_never_show(family: str, text: str, expected: Parsed) -> None:
    hidden = AnswerFormat(FAMILIES[family], NAMES).markers
    if "</tool_call>" not in text.removesuffix("</tool_call>"):  # a special token is no part of a string
        assert parsed(family, text, hidden) == expected
    for end in range(len(text)):
        content, reasoning, named = parsed(family, text[:end], hidden)
        shown = content + reasoning + "".join(arguments for _, arguments in named)
        assert not any(marker in shown for marker in hidden)


NO_CALLS = [
    ("hermes", 'Use <tool_call>{"name": "unknown", "arguments": {}}</tool_call> or so.'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "surprise": 1}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>f({"a": 1})</tool_call> \n'),
    ("hermes", "a <tool_call>  <tool_call> b"),
    ("hermes", '<tool_call>{"name": "f", "arguments": '),
    ("hermes", "1 < 2 and <tool"),
    ("hermes", "<think>not known here</think>"),
    ("hermes_think", "First <think>then</think>"),
    ("llama", '{"name": "Bob", "parameters": {}}'),
    ("llama", '{"city": "Köln"}'),
    ("llama", '  {"name": "f"'),
    ("llama", 'A call: {"name": "f", "parameters": {}}'),
    ("llama", '<|python_tag|>brave_search.call(query="x")'),
    ("mistral", '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
    ("mistral", "[TOOL_CALLS] [1, 2]"),
    ("mistral", "[TOOL_CALLS] [ ] nothing"),
    ("mistral", "[TOOL_CALLS]unknown[ARGS]{} x"),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]x"),
    ("mistral", "x[ARGS]{}"),
    ("deepseek", f"{D_BEGIN} \n{D_CALL}function{D_SEP}unknown\n```json\n{{}}\n```{D_END}{D_ALL_END}"),
    ("deepseek", f"{D_BEGIN} {D_CALL}f"),
    ("deepseek", f"{D_BEGIN} x {D_END} `y`"),
    ("deepseek", f"{D_BEGIN}{D_CALL}f{D_SEP}  "),
    ("harmony", "No header at all."),
    ("harmony", " to"),
]


@pytest.mark.parametrize(("family", "text"), NO_CALLS)
def test_what_is_no_call_is_content_unchanged(family: str, text: str) -> None:
    assert parsed(family, text) == (text, "", ())


def test_calls_of_other_functions_are_content_without_their_header() -> None:
    text = '<|channel|>commentary to=functions.unknown<|message|>{"a": 1}<|call|>'
    assert parsed("harmony", text) == ('{"a": 1}', "", ())
    assert parsed("harmony", text.replace("unknown", "f").replace("{", "no {")) == ('no {"a": 1}', "", ())


BROKEN = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1]} x</tool_call>', ("] x".replace("]", "]}"), '{"a": 1')),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, 5', ("5", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> x', (" x", '{"a": 1')),
    ("llama", '{"name": "f", "parameters": {"a": 1]} x', ("]} x", '{"a": 1')),
    ("mistral", "[TOOL_CALLS]f[ARGS]{]} x", ("]} x", "{")),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {]} x', ("]} x", "{")),
    ("deepseek", f"{D_BEGIN}{D_CALL}f{D_SEP}{{]", ("]", "{")),
    ("harmony", "<|channel|>commentary to=functions.f<|message|>{]} x", ("]} x", "{")),
]


@pytest.mark.parametrize(("family", "text", "expected"), BROKEN)
def test_what_breaks_a_call_that_was_begun_is_content(family: str, text: str, expected: tuple[str, str]) -> None:
    content, _, ((name, arguments),) = parsed(family, text)
    assert (content.strip(), name, arguments) == (expected[0].strip(), "f", expected[1])


@pytest.mark.parametrize(("family", "text", "expected"), CALLED)
def test_an_answer_that_ends_early_shows_the_calls_so_far(family: str, text: str, expected: Parsed) -> None:
    for end in range(len(text)):
        named = parsed(family, text[:end])[2]
        for (name, arguments), (wanted, whole) in zip(named, expected[2], strict=False):
            assert name == wanted
            assert whole.startswith(arguments)


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("think", "<think>\nOne\n\ntwo\n</think>\n\nThree\n", ("Three\n", "One\n\ntwo")),
        ("think", " \n<think>One</think>Two", ("Two", "One")),
        ("think", "  No thought", ("  No thought", "")),
        ("think", "<think>\n\n</think>\n\nTwo", ("Two", "")),
        ("think", "<think>never closed\n", ("", "never closed")),
        ("think", "<think>a<think>b</think>c</think>d", ("c</think>d", "a<think>b")),
        ("think", "late</think>", ("late</think>", "")),
        ("mistral", "[THINK]a[TOOL_CALLS]b[/THINK]c", ("c", "a[TOOL_CALLS]b")),
    ],
)
def test_reasoning_is_told_apart(family: str, text: str, expected: tuple[str, str]) -> None:
    assert parsed(family, text) == (*expected, ())


def test_reasoning_that_the_prompt_opened() -> None:
    assert parsed("think", "One\n</think>\n\nTwo", starts_in_reasoning=True) == ("Two", "One", ())
    assert parsed("think", "<think>\nOne</think>Two", starts_in_reasoning=True) == ("Two", "One", ())
    assert parsed("think", "One", starts_in_reasoning=True) == ("", "One", ())


def test_one_call_is_enough_where_calls_are_not_parallel() -> None:
    for family, text, expected in CALLED:
        whole = parsed(family, text + " and more", is_parallel=False)
        assert whole[2] == expected[2][:1], text
        assert "more" not in whole[0]


ALL_MARKERS = dict.fromkeys(itertools.chain(*(family.markers for family in FAMILIES.values())))
WORDS = st.sampled_from(
    [
        *ALL_MARKERS, '{"name": "f"', '"f"', "f", "{", "}", "[", "]", ",",
        ":", '"', "\\", " ", "\n",
        ";", '"name"', '"arguments"', '"parameters"', '{"a": 1}', "analysis", "final", " to=functions.f", "assistant",
        "function", "\n```json\n", "```", "text", "<", "é", "1", ', "arguments": {"x": "', '"}}',
    ]
)  # fmt: skip


EXAMPLES = settings(max_examples=300, deadline=None)


@EXAMPLES
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.one_of(
        st.lists(WORDS, max_size=25).map("".join),
        st.sampled_from([text for _, text, _ in CALLED]),
        st.sampled_from([text for _, text in NO_CALLS]),
    ),
    st.lists(st.integers(0, 250), max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_the_cut_changes_nothing(
    name: str, text: str, cuts: list[int], is_hidden: bool, starts_in_reasoning: bool
) -> None:
    answer_format = AnswerFormat(FAMILIES[name], NAMES, starts_in_reasoning=starts_in_reasoning)
    hidden = answer_format.markers if is_hidden else ()
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    by_piece = pieces_of(answer_format, pieces, hidden)
    by_character = pieces_of(answer_format, list(text), hidden)
    assert merged(itertools.chain(*by_piece)) == merged(itertools.chain(*by_character))
    for count, end in enumerate(bounds[1:], start=1):  # so has what was given out so far
        assert merged(itertools.chain(*by_piece[:count])) == merged(itertools.chain(*by_character[:end]))
    if is_hidden:
        content, reasoning, _ = folded(itertools.chain(*by_piece))
        assert not any(marker in content + reasoning for marker in hidden)


@EXAMPLES
@given(st.sampled_from(sorted(set(FAMILIES) - {"harmony"})), st.lists(WORDS, max_size=12).map("".join))
def test_without_calls_and_reasoning_the_text_is_unchanged(name: str, text: str) -> None:
    answer_format = AnswerFormat(FAMILIES[name], NAMES)
    content, reasoning, named = folded(itertools.chain(*pieces_of(answer_format, [text])))
    if not named and not any(marker in text for marker in (*THINK, "[THINK]", "[/THINK]")):
        assert (content, reasoning) == (text, "")


def test_families_are_told_from_the_template() -> None:
    assert family_of(chat_templates.QWEN3) == Family(HERMES, THINK)
    assert family_of(chat_templates.LLAMA31) == Family(LLAMA)
    assert family_of(chat_templates.MISTRAL) == Family(MISTRAL)
    assert family_of("<|channel|>final<|message|>") == Family(HARMONY)
    assert family_of(D_CALL + "</think>") == Family(DEEPSEEK, THINK, has_bare_calls=True)
    assert family_of("<tool_call><function=") == Family()
    assert all(family_of(chat_templates.ALL[name]).is_plain for name in ("plain", "parts", "trained"))
    for family in FAMILIES.values():
        for one, other in itertools.permutations(AnswerFormat(family, NAMES).markers, 2):
            assert not one.startswith(other)
    assert FAMILIES["think"].starts_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not FAMILIES["think"].starts_in_reasoning("<think>\n\n</think>\n\n")
    closed = FAMILIES["hermes_think"].after("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert closed == FAMILIES["hermes"]
    assert FAMILIES["hermes_think"].after("</think>Hello<|im_start|>assistant\n") == FAMILIES["hermes_think"]
    assert not FAMILIES["llama"].starts_in_reasoning("<think>\n")


@pytest.mark.parametrize(
    ("family", "begun"),
    [("hermes", '\n<tool_call>\n{"name": "f", "argum'), ("hermes", "</to"), ("mistral", '[TOOL_CALLS] [{"na')],
)
def test_a_call_that_must_come_and_is_cut_off_is_no_content(family: str, begun: str) -> None:
    assert parsed(family, begun, shows_content=False) == ("", "", ())
    assert parsed(family, begun)[0], "else it is text like any other"
