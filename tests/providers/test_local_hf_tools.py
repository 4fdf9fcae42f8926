"""Tool calls in a model's text."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import ToolCallDelta
from promptmesh.providers.hf_tools import ToolCallScanner, asks_for_tool_calls, read_call

ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = ONE + "\n" + ONE.replace("weather", "time")


def scan(pieces: list[str], *, single: bool = False) -> tuple[str, list[ToolCallDelta]]:
    scanner = ToolCallScanner(7, single=single)
    text = ""
    calls: list[ToolCallDelta] = []
    for piece in pieces:
        more, found = scanner.feed(piece)
        text += more
        calls += found
    more, found = scanner.close()
    assert scanner.calls == len(calls) + len(found)
    return text + more, [*calls, *found]


@given(st.lists(st.integers(1, 9), min_size=1))
def test_calls_are_found_however_the_text_is_cut(lengths: list[int]) -> None:
    whole = "I will look.\n" + TWO
    pieces: list[str] = []
    place = 0
    while place < len(whole):
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(whole[place : place + length])
        place += length
    text, calls = scan(pieces)
    assert text == "I will look.\n"
    assert [(call.index, call.name) for call in calls] == [(0, "weather"), (1, "time")]
    assert json.loads(calls[0].arguments) == {"city": "Köln"}


def test_the_same_calls_have_the_same_ids_and_others_have_others() -> None:
    first, second = scan([TWO])[1]
    again = scan(list(TWO))[1]
    assert (first.id, second.id) == (again[0].id, again[1].id)
    assert first.id != second.id
    later = ToolCallScanner(8, single=False)
    assert later.feed(ONE)[1][0].id != first.id


def test_one_call_is_enough_where_only_one_is_wanted() -> None:
    scanner = ToolCallScanner(7, single=True)
    text, calls = scanner.feed(TWO)
    assert (text, len(calls)) == ("", 1)
    assert scanner.stopped
    assert scanner.feed("more") == scanner.close() == ("", ())


def test_what_only_looks_like_a_call_stays_text() -> None:
    for text in (
        "<tool_call>no json</tool_call> after",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        "<tool_call>cut",
        "a < b <tool",
    ):
        assert scan(list(text)) == (text, [])


def test_the_end_of_the_answer_closes_a_call() -> None:
    text, calls = scan([ONE.removesuffix("</tool_call>")])
    assert text == ""
    assert calls[0].name == "weather"


def test_arguments_may_be_text() -> None:
    call = read_call('{"name": "f", "arguments": "{\\"a\\": 1}"}')
    assert call is not None
    assert call.arguments == '{"a": 1}'
    bare = read_call('{"name": "f"}')
    assert bare is not None
    assert bare.arguments == "{}"


def test_only_templates_of_this_form_offer_tools() -> None:
    assert asks_for_tool_calls(
        '{% if tools %}<tool_call>{\\"name\\": <function-name>, \\"arguments\\": '
        "<args-json-object>}</tool_call>{% endif %}"
    )
    assert not asks_for_tool_calls("{{ messages }}")
    assert not asks_for_tool_calls("{% if tools %}<tool_call><function=...>{% endif %}")
    assert not asks_for_tool_calls(None)
