"""A backend breaks off or dies in the middle of an answer, and the caller sees one answer."""

from pathlib import Path
from typing import Any

import pytest
from daemons import MODEL, REAL_MODEL, Daemon, mesh

#: The first breaks off after three words.
BREAKS = '[[providers]]\nkind = "echo"\nname = "breaks"\nafter = 3\nshare = true\n'
WORKS = '[[providers]]\nkind = "echo"\nname = "works"\nshare = true\n'
TEXT = "né €uro 😀 👩\u200d🚀 e\u0301nd of it"
STORY = "Tell me a story of a fox and a crow."


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content", "") for event in events for c in event["choices"])


async def streamed(node: Daemon, prompt: str, model: str, **fields: Any) -> list[dict[str, Any]]:
    async with node.stream(prompt, model, **fields) as stream:
        return [event async for event in stream]


async def check_both_turns(node: Daemon, begins: str) -> None:
    """Some answers are begun by who breaks off, and some are not; all are whole."""
    begun: dict[bool, str] = {}
    number = 0
    # Who goes on has had its turn, too, so the other one may begin twice; then it is left alone.
    while len(begun) < 2 and number < 10:
        number += 1
        prompt = f"{TEXT} {number}"
        last = (events := await streamed(node, prompt, "echo", temperature=0))[-1]
        assert text_of(events) == prompt
        assert last["choices"][0]["finish_reason"] == "stop"
        who = last["promptmesh"]
        assert who["provider"] == "works"
        assert who.get("begun_by", begins) == begins
        assert ("cid" in who) == ("begun_by" not in who)  # what two engines made is stored nowhere
        begun["begun_by" in who] = prompt
    assert len(begun) == 2
    for continued, prompt in begun.items():
        whole = (await node.chat(prompt, "echo", temperature=0)).json()
        assert whole["promptmesh"]["cache"] == ("miss" if continued else "hit-local")
        assert whole["choices"][0]["message"]["content"] == prompt


@pytest.mark.e2e
async def test_another_provider_of_the_node_goes_on(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": BREAKS + WORKS}) as (a,):
        await a.wait_for_model("echo", "a:breaks", "a:works")
        await check_both_turns(a, "a:breaks")


@pytest.mark.e2e
async def test_a_peer_goes_on_for_another(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": BREAKS, "c": WORKS}) as (a, *_):
        await a.wait_for_model("echo", "b:breaks", "c:works")
        await check_both_turns(a, "b:breaks")


# Two real models at once are much for a small machine: `tests/mesh/test_handover_model.py` has the
# seam itself in every run.
@pytest.mark.e2e
@pytest.mark.model
async def test_a_model_goes_on_where_the_other_was_killed(tmp_path: Path) -> None:
    nodes = {"a": "", "b": REAL_MODEL, "c": REAL_MODEL}
    async with mesh(tmp_path, nodes) as (a, b, c):
        await a.wait_for_model(MODEL.name, "b:local_hf", "c:local_hf")
        for peer in ("b", "c"):  # both have loaded it
            hi = await a.chat("hi", MODEL.name, promptmesh={"peer": peer}, max_tokens=1)
            assert hi.status_code == 200, hi.text
        fields: dict[str, Any] = {"temperature": 1, "max_tokens": 200}
        fields["stream_options"] = {"include_usage": True}
        events: list[dict[str, Any]] = []
        async with a.stream(STORY, MODEL.name, **fields) as stream:
            async for event in stream:
                events.append(event)
                if len(events) == 12:
                    begun = text_of(events)
                    first = next(n for n in (b, c) if n.name == events[0]["promptmesh"]["node"])
                    await first.kill()
        last, counted = events[-2:]
        assert "error" not in last | counted, (last, counted, await a.json("/mesh/v1/requests"))
        assert last["promptmesh"]["node"] in {"b", "c"} - {first.name}
        # Who goes on counts the tokens that there were: the whole has no more than it may, and as
        # two made it, it is stored nowhere.
        assert last["promptmesh"]["begun_by"] == f"{first.name}:local_hf"
        assert "cid" not in last["promptmesh"]
        assert text_of(events).startswith(begun)
        assert len(begun) < len(text_of(events))
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        assert counted["usage"]["completion_tokens"] <= fields["max_tokens"]
