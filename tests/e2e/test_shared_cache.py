"""One answer, computed once, found by everybody: real daemons share what they have answered."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import NamedTuple

import httpx
import pytest
import trio
from daemons import ECHO, SETTLE_S, Daemon, mesh, until

pytestmark = pytest.mark.e2e

QUESTIONS = 200
#: Questions that are asked at the same time.
AT_ONCE = 8
#: Liveness bound (s), with slack for a busy machine of two cores.
ANSWERED_IN = 240
#: Within this a node that joins late has the claims, once it knows its peers: they are told when
#: nodes meet, and not only by the repair of what gossip lost, which comes later.
CAUGHT_UP_IN = 45


class Answer(NamedTuple):
    """What a node answered."""

    text: str
    cid: str
    cache: str
    peer: str


class Asker:
    """Asks a node over kept connections."""

    def __init__(self, daemon: Daemon, client: httpx.AsyncClient) -> None:
        self.daemon = daemon
        self.peer = ""
        self._client = client

    async def ask(self, prompt: str) -> Answer:
        body = {
            "model": "echo",
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        response = await self._client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        origin = response.json()["promptmesh"]
        text = response.json()["choices"][0]["message"]["content"]
        return Answer(text, origin["cid"], origin["cache"], origin["peer"])

    async def claims(self) -> int:
        """How many claims of others it knows."""
        status = await self.daemon.json("/mesh/v1/status")
        self.peer = status["peer"]
        return int(status["cache"]["claims"])

    async def wait_for_claims(self, count: int, within: float = SETTLE_S) -> None:
        async def known() -> bool:
            return await self.claims() >= count

        await until(known, f"{self.daemon.name} knows {count} claims; {self.daemon.log}", within)


async def askers(daemons: Sequence[Daemon], stack: AsyncExitStack) -> list[Asker]:
    clients = [httpx.AsyncClient(base_url=daemon.url, timeout=ANSWERED_IN) for daemon in daemons]
    return [
        Asker(daemon, await stack.enter_async_context(client))
        for daemon, client in zip(daemons, clients, strict=True)
    ]


async def ask_all(questions: Sequence[tuple[Asker, str]]) -> list[Answer]:
    """Ask each at its node, several at once."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(questions))

    async def work() -> None:
        for number, (asker, prompt) in waiting:
            answers[number] = await asker.ask(prompt)

    with trio.fail_after(ANSWERED_IN):
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(work)
    return [answers[number] for number in range(len(questions))]


async def computed(daemons: Sequence[Daemon]) -> int:
    """How many answers their providers have begun."""
    started = 0
    for daemon in daemons:
        for provider in await daemon.json("/mesh/v1/providers"):
            started += provider["stats"]["started"]
    return started


async def test_every_answer_is_computed_once_and_found_everywhere(tmp_path: Path) -> None:
    rng = Random(5)
    configs = {"a": ECHO, "b": "", "c": ECHO, "d": "", "e": ECHO}
    prompts = [f"question {number} of {QUESTIONS}" for number in range(QUESTIONS)]
    async with mesh(tmp_path, configs) as daemons, AsyncExitStack() as stack:
        for daemon in daemons:
            await daemon.wait_for_peers(*(set(configs) - {daemon.name}))
            await daemon.wait_for_model("echo", "a", "c", "e")
        nodes = await askers(daemons, stack)

        places = [rng.choice(nodes) for _ in prompts]
        first = await ask_all(list(zip(places, prompts, strict=True)))
        assert [answer.text for answer in first] == prompts
        assert {answer.cache for answer in first} == {"miss"}
        assert await computed(daemons) == QUESTIONS

        by = Counter(answer.peer for answer in first)
        for node in nodes:
            await node.claims()
            await node.wait_for_claims(QUESTIONS - by[node.peer])

        others = [rng.choice([node for node in nodes if node is not place]) for place in places]
        again = await ask_all(list(zip(others, prompts, strict=True)))
        assert [(a.text, a.cid) for a in again] == [(a.text, a.cid) for a in first]
        assert {answer.cache for answer in again} <= {"hit-local", "hit-mesh"}
        assert "hit-mesh" in {answer.cache for answer in again}
        assert await computed(daemons) == QUESTIONS

        link = json.loads(await daemons[0].cli("invite", "--json"))["link"]
        late = Daemon(tmp_path / "late", "late")
        stack.push_async_callback(late.aclose)
        await late.cli("join", "-", stdin=link)
        await late.start()
        await late.wait_for_peers(*configs)
        (newcomer,) = await askers([late], stack)
        await newcomer.wait_for_claims(QUESTIONS, CAUGHT_UP_IN)
        found = await ask_all([(newcomer, prompt) for prompt in prompts])
        assert [(a.text, a.cid) for a in found] == [(a.text, a.cid) for a in first]
        assert {answer.cache for answer in found} == {"hit-mesh"}
        assert await computed(daemons) == QUESTIONS


async def test_equal_questions_under_way_are_computed_once(tmp_path: Path) -> None:
    """And who follows gets the whole answer, whatever becomes of who asked first."""
    async with mesh(tmp_path, {"a": "", "b": "", "c": ECHO}) as (a, b, c):
        for daemon in (a, b):
            await daemon.wait_for_model("echo", "c")
        answers: dict[str, httpx.Response] = {}

        async def ask(daemon: Daemon) -> None:
            slow = "the same question [[echo first_s=6]]"
            answers[daemon.name] = await daemon.chat(slow, "echo", temperature=0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, a)
            nursery.start_soon(ask, b)
        caches = {answer.headers["x-promptmesh-cache"] for answer in answers.values()}
        assert caches == {"miss", "coalesced"}
        assert len({answer.headers["x-promptmesh-cid"] for answer in answers.values()}) == 1
        assert await computed([c]) == 1

        long = "word [[echo n=60 gap_s=0.15]]"
        async with a.stream(long, "echo", temperature=0) as leading:
            await anext(leading)
            async with b.stream(long, "echo", temperature=0) as following:
                events = [await anext(following)]
                await a.kill()
                events += [event async for event in following]
        assert events[0]["promptmesh"]["cache"] == "coalesced"
        choices = [choice for event in events for choice in event["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text.split() == ["word"] * 60
        assert choices[-1]["finish_reason"] == "stop"
        assert await computed([c]) == 2
