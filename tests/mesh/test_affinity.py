"""Which backend has seen the beginning of a prompt."""

import pytest
from fakes_mesh import asking

from promptmesh.mesh.affinity import (
    HALF_LIFE,
    MAX_BACKENDS,
    MAX_PREFIXES,
    MIN_CHARACTERS,
    Affinity,
    beginnings,
)
from promptmesh.mesh.backend_id import BackendId
from promptmesh.providers.base import GenerateRequest, Message, Role, Text, Tool

A, B = BackendId("a", "p"), BackendId("b", "p")


def conversation(*turns: str, model: str = "m", tools: tuple[Tool, ...] = ()) -> GenerateRequest:
    roles: list[Role] = ["system", *(["user", "assistant"] * len(turns))]  # type: ignore[list-item]
    messages = tuple(
        Message(role=role, content=(Text(text=text),))
        for role, text in zip(roles, turns, strict=False)
    )
    return GenerateRequest(model=model, messages=messages, tools=tools)


RULES = "You are terse. " * 100
FIRST = conversation(RULES, "Hello " * 50)
NEXT = conversation(RULES, "Hello " * 50, "Hi. " * 10, "And now?")


def test_the_next_turn_knows_who_answered_the_last_one() -> None:
    affinity = Affinity()
    affinity.saw(beginnings(FIRST), A, 0.0)
    share = affinity.share(beginnings(NEXT), A, 0.0)
    assert share == pytest.approx(1800 / 1848)
    assert affinity.share(beginnings(NEXT), B, 0.0) == 0.0
    assert affinity.share(beginnings(FIRST), A, 0.0) == 1.0


def test_another_conversation_shares_the_instructions() -> None:
    affinity = Affinity()
    affinity.saw(beginnings(FIRST), A, 0.0)
    other = conversation(RULES, "Something else " * 100)
    assert affinity.share(beginnings(other), A, 0.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "other",
    [
        conversation(RULES, "Hello " * 50, model="other"),
        conversation(RULES, "Hello " * 50, tools=(Tool(name="clock"),)),
        conversation("!" + RULES, "Hello " * 50),
    ],
    ids=["model", "tools", "text"],
)
def test_what_begins_differently_shares_nothing(other: GenerateRequest) -> None:
    affinity = Affinity()
    affinity.saw(beginnings(FIRST), A, 0.0)
    assert affinity.share(beginnings(other), A, 0.0) == 0.0


def test_it_is_forgotten_with_time() -> None:
    affinity = Affinity()
    affinity.saw(beginnings(FIRST), A, 100.0)
    assert affinity.share(beginnings(FIRST), A, 100.0 + HALF_LIFE) == pytest.approx(0.5)
    assert affinity.share(beginnings(FIRST), A, 99.0) == 1.0


def test_a_short_prompt_is_not_worth_remembering() -> None:
    assert beginnings(asking(text="x" * (MIN_CHARACTERS - 1))) == ()
    assert len(beginnings(asking(text="x" * MIN_CHARACTERS))) == 1
    affinity = Affinity()
    affinity.saw((), A, 0.0)
    assert affinity.share((), A, 0.0) == 0.0


def test_what_is_remembered_is_bounded() -> None:
    affinity = Affinity()
    for i in range(MAX_BACKENDS + 1):
        affinity.saw(beginnings(FIRST), BackendId(str(i), "p"), 0.0)
    assert affinity.share(beginnings(FIRST), BackendId("0", "p"), 0.0) == 0.0
    assert affinity.share(beginnings(FIRST), BackendId("1", "p"), 0.0) == 1.0
    for i in range(MAX_PREFIXES + 5):
        affinity.saw(beginnings(asking(text=f"{i} " * MIN_CHARACTERS)), A, 0.0)
    assert len(affinity._seen) == MAX_PREFIXES
