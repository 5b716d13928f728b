"""Calls within what a model writes, however it comes in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.serve.bodies import Function, Tool
from jaxlm.serve.tools import CallReader, Form

TOOLS = [Tool(Function("look_up")), Tool(Function("weigh"))]
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"rock": "花岗岩"}}\n</tool_call>'
BARE = '{"name": "weigh", "parameters": {"kg": 2}}'


def read(form: Form, text: str, cuts: set[int]) -> tuple[str, list[Any]]:
    reader = CallReader(form, TOOLS)
    said, calls = "", []
    ends = sorted({*(cut for cut in cuts if cut < len(text)), len(text)})
    for begin, end in zip([0, *ends], ends, strict=False):
        new, made = reader.read(text[begin:end], end == len(text))
        said += new
        calls += [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in made]
    return said, calls


CASES: list[tuple[Form, str, str, list[Any]]] = [
    ("tagged", f"I look.{CALL}", "I look.", [("look_up", {"rock": "花岗岩"})]),
    ("tagged", f"{CALL}{CALL}", "", [("look_up", {"rock": "花岗岩"})] * 2),
    ("tagged", f"\n{CALL}\n{CALL}\n", "", [("look_up", {"rock": "花岗岩"})] * 2),
    ("tagged", f" so:\n{CALL}\n done ", " so:\n\n done ", [("look_up", {"rock": "花岗岩"})]),
    ("tagged", " \n", " \n", []),
    ("tagged", "no call <tool_", "no call <tool_", []),
    ("tagged", "<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
    ("tagged", CALL.replace("look_up", "other"), CALL.replace("look_up", "other"), []),
    ("tagged", CALL[:30], CALL[:30], []),
    ("bare", BARE, "", [("weigh", {"kg": 2})]),
    ("bare", f"{BARE}; {BARE}", "", [("weigh", {"kg": 2})] * 2),
    ("bare", '{"rock": 1}', '{"rock": 1}', []),
    ("bare", "plain {words}", "plain {words}", []),
]


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES, ids=[text[:24] for _, text, _, _ in CASES])
def test_calls_are_taken_out_and_nothing_else(form: Form, text: str, said: str, calls: list[Any]) -> None:
    assert read(form, text, set()) == (said, calls)
    assert read(form, text, set(range(200))) == (said, calls)


@given(
    st.lists(st.sampled_from([CALL, "rock", "\n ", "<tool", "_call>", "<", "</tool_call>", "{}"]), max_size=5),
    st.sets(st.integers(0, 300)),
)
def test_pieces_change_nothing(parts: list[str], cuts: set[int]) -> None:
    text = "".join(parts)
    assert read("tagged", text, cuts) == read("tagged", text, set())
